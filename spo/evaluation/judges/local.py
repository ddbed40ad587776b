"""Judges that are models on this machine: a reward model, and a language model that answers questions."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spo.batching import chunks
from spo.bounds import FloatType, Fraction, NonNegativeFloat, PositiveInt
from spo.data.encoding import Ids
from spo.data.rows import Text
from spo.errors import JudgeError, UserError
from spo.evaluation.judges.base import JudgedPair, as_read, progress, with_answer
from spo.evaluation.judges.inputs import Frame, JudgeEncoder, without_beginning
from spo.evaluation.judges.pairwise import PairwiseJudge, check_template, question
from spo.evaluation.judges.reward import RewardJudge
from spo.evaluation.judges.together import Forwards
from spo.forward.head import completion_logits
from spo.forward.neighbors import groups_to_score, scale_of
from spo.forward.probe import probe_company
from spo.models.causality import check_causal
from spo.models.library_errors import Origin
from spo.models.loading import causal_part, load_config, load_tokenizer, load_weights
from spo.ops.logps import at_least_float32
from spo.records.digests import code_version, model_digest
from spo.types import Sequences

CODE_DEPENDENCIES = (
    "data/chat.py",
    "data/clock.py",
    "data/encoding.py",
    "data/message_forms.py",
    "evaluation/judges",
    "models/tokenizer.py",
)
"""Files that the tokens of a judge's input depend on, besides the files of its model."""


class LocalModel:
    """Hugging Face model and its tokenizer, loaded when they are first used.

    Args:
        auto_class: Class of transformers that loads the model.
        path: Hugging Face folder or hub name.
        dtype: Name of the torch dtype of the weights; ``auto`` for that of the file.
        trust_remote_code: Whether code in the model folder may run.
        device: Name of a torch device; ``None`` for the GPU if there is one.
        batch_size: Number of rows at a time.
        template_kwargs: Arguments of the chat template, ``None`` for none.
    """

    def __init__(
        self,
        auto_class: Any,
        path: str,
        dtype: str,
        trust_remote_code: bool,
        device: str | None,
        batch_size: int,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.auto_class, self.path, self.dtype, self.trust_remote_code = auto_class, path, dtype, trust_remote_code
        self.template_kwargs = template_kwargs
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return the digest of weights, configuration and tokenizer, the precision, and the code that encodes."""
        code = code_version(*CODE_DEPENDENCIES)
        return {"weights": model_digest(self.path), "dtype": self.dtype, "code": code}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer.

        Raises:
            JudgeError: The tokenizer cannot be loaded.
        """
        with self._as_judge_errors():
            return load_tokenizer(self._origin, self.trust_remote_code)

    @cached_property
    def encoder(self) -> JudgeEncoder:
        """Return the encoder of what the model reads.

        Raises:
            JudgeError: The tokenizer cannot be loaded.
        """
        return JudgeEncoder(self.tokenizer, self.path, self.template_kwargs)

    @cached_property
    def model(self) -> PreTrainedModel:
        """Return the model, frozen, in eval mode, on its device.

        Raises:
            JudgeError: The model cannot be loaded, or some of its weights are missing and would be random.
        """
        with self._as_judge_errors():
            settings: dict[str, Any] = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
            writes = self.auto_class is AutoModelForCausalLM
            if writes:
                settings |= causal_part(self._origin, load_config(self._origin, self.trust_remote_code))
            model = load_weights(self.auto_class, self._origin, **settings)
            if writes:
                check_causal(self._origin, model)
        scale_of(model)  # Rotary positions must not remember earlier rows.
        return model.requires_grad_(False).eval().to(self.device)

    @property
    def _origin(self) -> Origin:
        return Origin(self.path, "judge.path")

    @contextmanager
    def _as_judge_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise JudgeError(str(error)) from error

    @property
    def context(self) -> int:
        """Return the number of tokens in the context of the model."""
        most = self.tokenizer.model_max_length
        return min(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or most, most)

    def batches(self, rows: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Yield positions of rows in batches, rows of similar length together, unless they would change each other."""
        lengths = [len(row) for row in rows]
        for group in groups_to_score(self.model, lambda: lengths) or [list(range(len(rows)))]:
            yield from chunks(sorted(group, key=lengths.__getitem__), self.batch_size)


class RewardModelJudge(RewardJudge):
    """Judge that compares completions by a reward model: a sequence classification model with one output.

    The chat template of the tokenizer renders prompt and completion, as a turn of the user and one of the assistant.
    Without a template they are a pair if the tokenizer has a separator, as that of BERT, else one text that ends in
    EOS.

    Args:
        path: Hugging Face folder or hub name.
        dtype: Name of the torch dtype of the weights; ``auto`` for that of the file.
        trust_remote_code: Whether code in the model folder may run.
        device: Name of a torch device; ``None`` for the GPU if there is one.
        batch_size: Number of texts at a time.
        max_length: Limit of tokens in a text, which loses its beginning beyond it; ``None`` for the context of the
            model.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: Literal["auto"] | FloatType,
        trust_remote_code: bool,
        device: str | None,
        batch_size: PositiveInt,
        max_length: Annotated[int, Ge(2)] | None,
    ) -> None:
        super().__init__(self._rewards)
        self._local = LocalModel(AutoModelForSequenceClassification, path, dtype, trust_remote_code, device, batch_size)
        self.max_length = max_length
        self.truncated = 0
        self.forwards = Forwards(self._rewards_of)

    @staticmethod
    def check_folder(path: str) -> None:
        """Check a folder before training, from its config alone.

        Raises:
            JudgeError: The model has not exactly one output.
        """
        _check_outputs(path, PretrainedConfig.from_pretrained(path).num_labels)

    @property
    def identity(self) -> dict[str, Any]:
        """Return the digest of the weights, and the limit of tokens."""
        return {"judge": "reward_model", **self._local.identity, "max_length": self.max_length}

    def usage(self) -> dict[str, float]:
        """Return the number of texts that were too long and lost their beginning."""
        return {"truncated": float(self.truncated)}

    def _shown(self, prompt: Text) -> Text:
        return prompt  # its own chat template reads the messages of a conversation

    def _rewards(self, prompts: Sequence[Text], completions: Sequence[str]) -> dict[str, list[float]]:
        model = self._local.model
        _check_outputs(self._local.path, model.config.num_labels)
        rows = [self._encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        self._local.encoder.note_leaks()
        rewards = [0.0] * len(rows)
        with progress("scoring", len(rows)) as advance:
            batches = list(self._local.batches([ids for ids, _ in rows]))
            found = self.forwards.of([[rows[i] for i in batch] for batch in batches])
            for batch, values in zip(batches, found, strict=True):
                for i, value in zip(batch, values, strict=True):
                    rewards[i] = value
                advance(len(batch))
        return {"reward": rewards}

    @torch.no_grad()
    def _rewards_of(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Return the rewards of the rows of a batch."""
        return at_least_float32(self._local.model(**self._padded(rows)).logits).squeeze(-1).tolist()

    def _encode(self, prompt: Text, completion: str) -> tuple[list[int], list[int]]:
        """Return the tokens that the model reads, and their types."""
        frame, parts = self._framed(prompt, completion)
        room = (self.max_length or self._local.context) - len(frame)
        if room < 1:
            raise JudgeError(f"judge.max_length={self.max_length}: the tokenizer alone adds {len(frame)} tokens")
        if sum(map(len, parts)) > room:
            self.truncated += 1
            parts = without_beginning(parts, room)
        return frame.join(parts)

    def _framed(self, prompt: Text, completion: str) -> tuple[Frame, list[Ids]]:
        """Return the tokens around the texts, which truncation leaves, and the tokens of the texts."""
        tokenizer, encoder = self._local.tokenizer, self._local.encoder
        if encoder.chat is not None:  # the template writes BOS and the ends of turns itself
            [ids] = encoder.encode(encoder.rendered(with_answer(prompt, completion), opens=False))
            n = int(ids[:1] == (tokenizer.bos_token_id,))
            return Frame.around(ids[:n], ()), [ids[n:]]
        if tokenizer.sep_token is not None:
            texts = [as_read(prompt), completion]
            return encoder.pair_frame, encoder.encode(*map(encoder.text.hide, texts))
        text = prompt + completion if isinstance(prompt, str) else as_read(with_answer(prompt, completion))
        first, last = encoder.frame.added
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in last:
            last += (tokenizer.eos_token_id,)
        return Frame.around(first, last), encoder.encode(encoder.text.hide(text))

    def _padded(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        width = max(len(ids) for ids, _ in rows)
        padding = self._padding([ids for ids, _ in rows])

        def column(values: Sequence[list[int]], fill: int) -> Tensor:
            return torch.tensor([[*row, *[fill] * (width - len(row))] for row in values], device=self._local.device)

        columns = {
            "input_ids": column([ids for ids, _ in rows], padding),
            "attention_mask": column([[1] * len(ids) for ids, _ in rows], 0),
        }
        # GPT-2 would add the embedding of token 0 for each type 0, so only models with types are given them.
        if (getattr(self._local.model.config, "type_vocab_size", None) or 0) > 1:
            columns["token_type_ids"] = column([types for _, types in rows], 0)
        return columns

    def _padding(self, rows: Sequence[Sequence[int]]) -> int:
        """Return a padding token that no row contains. Decoder models find the end of a row by its value."""
        used = {token for row in rows for token in row}
        token = self._local.tokenizer.pad_token_id
        if token is None or token in used:
            token = next(i for i in count() if i not in used)
        self._local.model.config.get_text_config().pad_token_id = token
        return token


def _check_outputs(path: str, outputs: int | None) -> None:
    if outputs != 1:
        raise JudgeError(
            f"judge.path={path}: this model has {outputs} outputs, and a reward model has one (num_labels=1); wrap a "
            "classifier in your own reward function and set judge=function"
        )


class LanguageModelJudge(PairwiseJudge):
    """Judge that asks a causal language model and compares the log-probabilities of the answers ``A`` and ``B``.

    Nothing is generated: one forward pass answers one question. The chat template of the tokenizer renders the
    question, if there is one.

    Args:
        path: Hugging Face folder or hub name.
        dtype: Name of the torch dtype of the weights; ``auto`` for that of the file.
        trust_remote_code: Whether code in the model folder may run.
        device: Name of a torch device; ``None`` for the GPU if there is one.
        batch_size: Number of questions at a time.
        template: Template of the question with ``{prompt}``, ``{first}`` and ``{second}``.
        margin: Largest difference of the log-probabilities that is a tie, nats.
        cache: File of the verdicts.
        max_unanswered: Share of the questions that may remain unanswered, because they exceed the context.

    Raises:
        ValueError: The template lacks a placeholder.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: Literal["auto"] | FloatType,
        trust_remote_code: bool,
        device: str | None,
        batch_size: PositiveInt,
        template: str,
        margin: NonNegativeFloat,
        cache: str,
        max_unanswered: Fraction,
    ) -> None:
        super().__init__(cache, max_unanswered)
        # Reasoning models must answer at once. Other templates ignore this argument.
        now = {"enable_thinking": False}
        self._local = LocalModel(AutoModelForCausalLM, path, dtype, trust_remote_code, device, batch_size, now)
        self.template, self.margin = check_template(template), margin
        self.forwards = Forwards(self._differences)

    @property
    def identity(self) -> dict[str, Any]:
        """Return the digest of the weights, the question and the margin."""
        return {
            "judge": "language_model",
            **self._local.identity,
            "template": self.template,
            "margin": self.margin,
        }

    def ask(self, comparisons: Sequence[JudgedPair]) -> Generator[Mapping[JudgedPair, float | str], None, None]:
        """Answer a batch at a time.

        Raises:
            JudgeError: The tokens of the answers A and B are the same.
        """
        context = self._local.context
        probe_company(self._local.model)
        questions = [self._encode(comparison) for comparison in comparisons]
        self._local.encoder.note_leaks()
        fitting = [i for i, (ids, _) in enumerate(questions) if len(ids) <= context]
        for i in set(range(len(questions))) - set(fitting):
            length = len(questions[i][0])
            yield {comparisons[i]: f"a question of {length} tokens exceeds the judge's context of {context}"}
        batches = [[fitting[i] for i in batch] for batch in self._local.batches([questions[i][0] for i in fitting])]
        found = self.forwards.of([[questions[i] for i in batch] for batch in batches])
        for batch, differences in zip(batches, found, strict=True):
            self.spend(calls=len(batch), tokens=sum(len(questions[i][0]) for i in batch))
            yield {comparisons[i]: self._verdict(value) for i, value in zip(batch, differences, strict=True)}

    def _verdict(self, difference: float) -> float:
        return 0.5 if abs(difference) <= self.margin else float(difference > 0)

    @torch.no_grad()
    def _differences(self, questions: Sequence[tuple[list[int], tuple[int, int]]]) -> list[float]:
        """Return for each question the log-probability of A minus that of B, in nats."""
        lengths = torch.tensor([len(ids) for ids, _ in questions])
        ids = torch.zeros(len(questions), int(lengths.max()) + 1, dtype=torch.long)
        for row, (question_ids, (label, _)) in zip(ids, questions, strict=True):
            row[: len(question_ids) + 1] = torch.tensor([*question_ids, label])
        sequences = Sequences(ids, lengths, lengths + 1).to(self._local.device)
        logits = at_least_float32(completion_logits(self._local.model, sequences))
        labels = torch.tensor([labels for _, labels in questions], device=logits.device)
        first, second = logits.gather(-1, labels).unbind(-1)
        return (first - second).tolist()

    def _encode(self, comparison: JudgedPair) -> tuple[list[int], tuple[int, int]]:
        """Return the tokens of the question, and the first token in which the two answers differ, for each answer."""
        encoder = self._local.encoder
        if encoder.chat is None:
            hidden = JudgedPair(*map(encoder.text.hide, (comparison.prompt, comparison.first, comparison.second)))
            text = question(self.template, hidden).rstrip()
            before = encoder.frame.added[0]
        else:
            turn = {"role": "user", "content": question(self.template, comparison).rstrip()}
            text = encoder.rendered([turn], opens=True)
            before = ()
        gap = "" if text[-1:].isspace() else " "
        first, second = encoder.encode(*(f"{text}{gap}{label}" for label in "AB"))
        cut = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if cut is None:
            raise JudgeError(f"judge.path={self._local.path}: its tokenizer has the same tokens for A and B")
        return [*before, *first[:cut]], (first[cut], second[cut])
