"""Models that ``spo sample`` and ``spo chat`` sample from: the policy of a run, its reference, or any model folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from spo.config.checks import problems
from spo.config.compose import compose
from spo.data import DataError, Renderer, Row, Source
from spo.data.rows import Message, Text
from spo.errors import ConfigProblems, UserError, memory_for
from spo.evaluation.judges import Judge
from spo.forward.speed import Speed
from spo.metrics.catalogue import REFERENCE
from spo.models import ModelSpec
from spo.records import filenames
from spo.records.files import read_jsonl
from spo.records.policy import verify_policy
from spo.runs.saved_config import load_config, refuse_redacted
from spo.sampling import contents, sample
from spo.sampling.linear_alignment import sample_aligned
from spo.sampling.stream import stream
from spo.stages.evaluation_config import trusted_evaluation
from spo.stages.from_config import eval_device, make_renderer, model_spec, resolve_values, training_numerics
from spo.stages.reference_model import find_reference
from spo.stages.sample_request import SampleRequest, TrustedOverrides, is_run_directory

# Groups of which neither a model nor its tokens are made. A judge chooses only with --best-of.
_UNUSED_GROUPS = (
    "alpha",
    "beta",
    "callbacks",
    "judge",
    "logger",
    "method",
    "optimizer",
    "reference",
    "regularizer",
    "scheduler",
)
# The cache finds a fine-tuned reference by these keys, so they stay whole with --against reference.
_KEYS_OF_CACHED_REFERENCE = ("data.source", "data.reward", "iteration")
# Text of a message, to find what a template writes after it. Templates that change letters do not change digits.
_MARK = "730594846197"


class _NoData(Source):
    """A source without rows: a prompt of the command line does not need the data of the run."""

    def rows(self, complete: Any) -> list[Row]:
        """Return no row."""
        return []


@dataclass(frozen=True)
class Completed:
    """A sampled completion.

    Attributes:
        text: Text without the tokens that end it.
        tokens: Length in tokens, with the token that ends it.
        seed: Seed by which it was drawn.
    """

    text: str
    tokens: int
    seed: int


@dataclass(frozen=True)
class SampledModel:
    """A model with all that is needed to sample from it.

    Attributes:
        name: Name for a person: ``policy``, ``reference``, or the path that was named.
        cfg: Configuration of the run, or one composed for a model folder, resolved.
        model: Frozen model on its device.
        renderer: Conversion between texts and tokens.
        sampler: Name of the sampler.
        temperature: Temperature of the softmax.
        top_p: Probability that the nucleus of each token has to reach.
        max_new_tokens: Length limit of a completion in tokens.
        is_chat: True where a prompt is a user's message for the chat template.
    """

    name: str
    cfg: DictConfig
    model: nn.Module
    renderer: Renderer
    sampler: str
    temperature: float
    top_p: float
    max_new_tokens: int
    is_chat: bool

    def prompt_of(self, text: str, principle: str | None = None) -> Text:
        """Return the prompt of this model for a text: the text itself, or the messages of a conversation.

        A principle becomes the system message, as in the official code of Linear Alignment. Where the chat template
        does not take one, or the prompt is text, it stands before the text of the prompt.

        Args:
            text: Text of the prompt.
            principle: Principle of Linear Alignment, or ``None``.
        """
        before = "" if principle is None else f"{principle}\n\n"
        if not self.is_chat:
            return before + text
        asked: Message = {"role": "user", "content": text}
        if principle is None:
            return (asked,)
        messages: Text = ({"role": "system", "content": principle}, asked)
        try:
            self.renderer.prompt_ids(messages)
        except DataError:
            return ({"role": "user", "content": before + text},)
        return messages

    def ids_of(self, prompt: Text) -> tuple[int, ...]:
        """Return the tokens of a prompt.

        Args:
            prompt: Prompt in the form of :meth:`prompt_of`.

        Raises:
            UserError: The prompt does not leave room for ``max_new_tokens`` in the context of the model.
        """
        ids = self.renderer.prompt_ids(prompt)
        config: Any = self.model.config
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        if context is not None and len(ids) + self.max_new_tokens > context:
            raise UserError(
                f"the prompt has {len(ids)} tokens, which leaves no room for {self.max_new_tokens} new ones in the "
                f"context of {context} tokens ({self.name}): shorten it, or lower --max-new-tokens"
            )
        return ids

    def draw(
        self,
        prompt: Text,
        seeds: Sequence[int],
        principled: Text | None = None,
        **alignment: Any,
    ) -> list[Completed]:
        """Draw a completion for each seed: those of :func:`spo.sampling.sample`.

        Args:
            prompt: Prompt in the form of :meth:`prompt_of`.
            seeds: Seed of each completion.
            principled: Prompt with the principle of Linear Alignment, or ``None``.
            alignment: ``ratio`` and ``nucleus`` of :func:`spo.sampling.linear_alignment.sample_aligned`.

        Raises:
            UserError: The prompt is too long, or the memory does not suffice.
        """
        prompts = [self.ids_of(prompt)] * len(seeds)
        with (
            training_numerics(self.cfg, eval_device(self.cfg), self.model),
            memory_for("sampling", "-n", "--best-of", "--max-new-tokens"),
        ):
            if principled is None:
                sequences = sample(self.model, prompts, seeds=seeds, sampler=self.sampler, **self._settings)
            else:
                with_it = [self.ids_of(principled)] * len(seeds)
                sequences = sample_aligned(self.model, with_it, prompts, seeds=seeds, **alignment, **self._settings)
        texts = map(self.renderer.decode, contents(sequences, self.renderer.stop_ids))
        lengths = sequences.completion_length.tolist()
        return [Completed(*one) for one in zip(texts, lengths, seeds, strict=True)]

    def stream(self, prompt: Text, seed: int, on_text: Callable[[str], None]) -> Completed:
        """Draw the completion that :meth:`draw` draws, and hand over its text as it grows.

        Args:
            prompt: Prompt in the form of :meth:`prompt_of`.
            seed: Seed of the completion.
            on_text: Function to call with each further piece of the text.

        Raises:
            UserError: The prompt is too long.
        """
        ids, so_far, shown = self.ids_of(prompt), [], 0

        def on_token(token: int) -> None:
            nonlocal shown
            so_far.append(token)
            text = self._text(so_far)
            # The bytes of a character may be spread over tokens.
            if not text.endswith("\ufffd") and len(text) > shown:
                on_text(text[shown:])
                shown = len(text)

        with training_numerics(self.cfg, eval_device(self.cfg), self.model):
            completion = stream(self.model, ids, on_token, seed=seed, **self._settings)
        text = self._text(completion)
        if len(text) > shown:
            on_text(text[shown:])
        return Completed(text, len(completion), seed)

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop_ids": self.renderer.stop_ids,
            "pad_token_id": self.renderer.tokenizer.pad_token_id,
        }

    def _text(self, ids: Sequence[int]) -> str:
        """Return the text of a completion without the token that ends it."""
        return self.renderer.decode(ids[:-1] if ids and ids[-1] in self.renderer.stop_ids else ids)


# --- loading -------------------------------------------------------------------------------------------------------


def load_sampled(request: SampleRequest, trusted: TrustedOverrides) -> list[SampledModel]:
    """Load the model of a command, and the one that it is compared with.

    Args:
        request: Settings of the command.
        trusted: Overrides, and the names that the person trusts.

    Raises:
        UserError: A model cannot be found or loaded, or a run's configuration asks for something that must be allowed.
    """
    first = _load(request, request.model, trusted)
    if request.against is None:
        return [first]
    if request.against == REFERENCE:
        return [first, _reference_of(request, first, trusted)]
    # Overrides of the data and the judge are about the first model.
    shared = [word for word in trusted.overrides if word.partition(".")[0] in ("model", "trainer")]
    unjudged = replace(request, best_of=None)
    other = _load(unjudged, Path(request.against), replace(trusted, overrides=shared))
    return [first, replace(other, name=request.against)]


def load_judge(model: SampledModel, trusted: TrustedOverrides) -> Judge:
    """Return the judge of a run, or the one that overrides name.

    Args:
        model: Model of the command.
        trusted: Overrides, and the names that the person trusts.

    Raises:
        UserError: There is no judge, or its settings are wrong.
    """
    named = any(word.partition("=")[0].partition(".")[0] == "judge" for word in trusted.overrides)
    is_run = model.name == filenames.POLICY
    if is_run or named:
        refuse_redacted(model.cfg)
        if found := [problem for problem in problems(model.cfg) if problem.startswith("judge")]:
            raise ConfigProblems(found)
        judge: Judge | None = instantiate(model.cfg.judge, _convert_="all")
        if judge is not None:
            return judge
    whose = "the run does not have a judge" if is_run else "a model folder does not have a judge"
    raise UserError(f"--best-of: {whose}: name one, such as judge=reward_model judge.path=MODEL")


def _load(request: SampleRequest, path: Path, trusted: TrustedOverrides) -> SampledModel:
    """Load the policy of a run, or the model in a folder."""
    if is_run_directory(path):
        verify_policy(path)
        cfg, folder, name = _configs_of_run(request, path, trusted)[0], path / filenames.POLICY, filenames.POLICY
    else:
        quoted = str(path.absolute()).replace("'", r"\'")
        composed = compose(["model=hf", f"model.path='{quoted}'", *trusted.overrides], trusted.config_dir, path)
        cfg, folder, name = resolve_values(composed), path, str(path)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    spec = model_spec(cfg)
    tokenizer = spec.tokenizer(folder)
    renderer = make_renderer(cfg, tokenizer, _NoData(), spec.stop_ids(folder))
    model: nn.Module = spec.base(folder)
    return _sampled(request, path, name, cfg, model, renderer)


def _reference_of(request: SampleRequest, policy: SampledModel, trusted: TrustedOverrides) -> SampledModel:
    """Load the reference of a run, which is a given model or lies in the cache."""
    run_dir = request.model
    own = _configs_of_run(request, run_dir, trusted)[1]
    spec: ModelSpec = model_spec(own)
    base = find_reference(own, spec)
    if base is None:
        raise UserError(
            f"--against reference: the reference of {run_dir} was made by supervised fine-tuning and is not in the "
            f"cache {own.paths.cache} any more: spo evaluate {run_dir} makes it again, or name another model as "
            "--against FOLDER"
        )
    model = spec.start(base).to(eval_device(own))
    speed = Speed(**own.speed).resolve_for(model)
    return replace(policy, name=REFERENCE, model=model, sampler=speed.sampler)


def _configs_of_run(request: SampleRequest, run_dir: Path, trusted: TrustedOverrides) -> tuple[DictConfig, DictConfig]:
    """Return the configuration of a run with the overrides, and that by which its reference was made, resolved.

    They do not name the parts that the command does not build, so that nobody has to allow them. With --best-of,
    a check of the whole configuration imports every part, so every part has to be allowed.
    """
    unused: tuple[str, ...] = () if request.best_of is not None else _UNUSED_GROUPS
    if unused and request.against != REFERENCE:
        unused += _KEYS_OF_CACHED_REFERENCE
    own = load_config(run_dir)
    cfg = trusted_evaluation(own, run_dir, trusted.overrides, trusted.allow, trusted.config_dir, unused)
    return resolve_values(cfg), resolve_values(own)


def _sampled(
    request: SampleRequest, path: Path, name: str, cfg: DictConfig, model: nn.Module, renderer: Renderer
) -> SampledModel:
    """Put a loaded model on its device, and fill in what the command leaves out."""
    model = model.requires_grad_(False).to(eval_device(cfg))
    evaluation = cfg.evaluation
    return SampledModel(
        name,
        cfg,
        model,
        renderer,
        Speed(**cfg.speed).resolve_for(model).sampler,
        evaluation.temperature if request.temperature is None else request.temperature,
        request.top_p,
        evaluation.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens,
        not request.plain and _speaks_in_messages(path, renderer),
    )


def _speaks_in_messages(path: Path, renderer: Renderer) -> bool:
    """Return whether the model has a chat template, and was not trained on plain text.

    The samples of a run hold its prompts as the model saw them. Rendered prompts end in what the template writes after
    a message.
    """
    if not renderer.tokenizer.chat_template:
        return False
    seen = read_jsonl(path / filenames.SAMPLES) if (path / filenames.SAMPLES).is_file() else []
    asked: tuple[Message, ...] = ({"role": "user", "content": _MARK},)
    rendered = renderer.render(Row(prompt=asked, chosen=({"role": "assistant", "content": _MARK},)))
    end = getattr(rendered, "prompt_text", "").rpartition(_MARK)[2]
    return not seen or not end or str(seen[0].get("prompt", "")).endswith(end)
