"""Judges that are models on this machine: a reward model, and a language model that is asked."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spo.bounds import FloatType, Fraction, NonNegativeFloat, PositiveInt
from spo.errors import JudgeError
from spo.evaluation.judges.base import JudgedPair, progress
from spo.evaluation.judges.pairwise import PairwiseJudge, check_template, question
from spo.evaluation.judges.reward import RewardJudge
from spo.forward.head import completion_logits
from spo.ops.logps import at_least_float32
from spo.records.digests import model_digest
from spo.types import Sequences


class LocalModel:
    """A Hugging Face model and its tokenizer, loaded when they are first needed.

    Args:
        auto_class: transformers' class that loads it.
        path: Hugging Face folder or hub name.
        dtype: of the weights, a name of torch's; ``auto``: as they were saved.
        trust_remote_code: whether code in the model folder may run.
        device: torch's name of a device; ``None``: the GPU where there is one.
        batch_size: rows at a time.
    """

    def __init__(
        self, auto_class: Any, path: str, dtype: str, trust_remote_code: bool, device: str | None, batch_size: int
    ) -> None:
        self.auto_class, self.path, self.dtype, self.trust_remote_code = auto_class, path, dtype, trust_remote_code
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Digest of weights, configuration and tokenizer; precision."""
        return {"weights": model_digest(self.path), "dtype": self.dtype}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            JudgeError: there is none.
        """
        return self._loaded(AutoTokenizer)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, frozen, in eval mode, on its device.

        Raises:
            JudgeError: there is none, or weights of it are missing, which would be random.
        """
        model, found = self._loaded(self.auto_class, dtype=self.dtype, output_loading_info=True)
        if absent := sorted(found["missing_keys"]):
            raise JudgeError(
                f"judge.path={self.path}: these are not the weights of a {type(model).__name__}, {absent[0]} is missing"
            )
        return model.requires_grad_(False).eval().to(self.device)

    def _loaded(self, auto_class: Any, **settings: Any) -> Any:
        try:
            return auto_class.from_pretrained(self.path, trust_remote_code=self.trust_remote_code, **settings)
        except (OSError, ValueError) as error:
            raise JudgeError(f"judge.path={self.path}: {auto_class.__name__} cannot load it ({error})") from error

    @property
    def context(self) -> int:
        """Tokens that the model takes."""
        most = self.tokenizer.model_max_length
        return min(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or most, most)

    def batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Positions of the rows, a batch at a time, rows of like length together."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        return (order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size))


class RewardModelJudge(RewardJudge):
    """Compares completions by a reward model: a sequence classification model with one output.

    It reads prompt and completion through its tokenizer's chat template, as a turn of the user and one of the
    assistant; without a template as a pair where the tokenizer has a separator, as BERT's, else as one text that ends
    in EOS.

    Args:
        path: Hugging Face folder or hub name.
        dtype: of the weights, a name of torch's; ``auto``: as they were saved.
        trust_remote_code: whether code in the model folder may run.
        device: torch's name of a device; ``None``: the GPU where there is one.
        batch_size: texts at a time.
        max_length: tokens of a text, which loses its beginning where it is longer; ``None``: what the model takes.
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

    @staticmethod
    def check_folder(path: str) -> None:
        """Check a folder before training, from its config alone.

        Raises:
            JudgeError: The model has not exactly one output.
        """
        _check_outputs(path, PretrainedConfig.from_pretrained(path).num_labels)

    @property
    def identity(self) -> dict[str, Any]:
        """Weights, and how much of a text is read."""
        return {"judge": "reward_model", **self._local.identity, "max_length": self.max_length}

    def usage(self) -> dict[str, float]:
        """How many texts were too long and lost their beginning."""
        return {"truncated": float(self.truncated)}

    @torch.no_grad()
    def _rewards(self, prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
        model = self._local.model
        _check_outputs(self._local.path, model.config.num_labels)
        rows = [self._encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        rewards = [0.0] * len(rows)
        with progress("scoring", len(rows)) as advance:
            for batch in self._local.batches([row["input_ids"] for row in rows]):
                logits = at_least_float32(model(**self._padded([rows[i] for i in batch])).logits)
                for i, value in zip(batch, logits.squeeze(-1).tolist(), strict=True):
                    rewards[i] = value
                advance(len(batch))
        return {"reward": rewards}

    def _encode(self, prompt: str, completion: str) -> dict[str, list[int]]:
        tokenizer = self._local.tokenizer
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            texts = [str(tokenizer.apply_chat_template(turns, tokenize=False))]
        elif tokenizer.sep_token is not None:
            texts = [prompt, completion]
        else:
            texts = [f"{prompt}{completion}{tokenizer.eos_token or ''}"]
        special = not tokenizer.chat_template  # a template has written them
        row = tokenizer(*texts, add_special_tokens=special, verbose=False)
        limit = self.max_length or self._local.context
        if len(row["input_ids"]) > limit:
            self.truncated += 1
            tokenizer.truncation_side = "left"
            row = tokenizer(*texts, add_special_tokens=special, truncation=True, max_length=limit)
        return dict(row)

    def _padded(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        padding = self._padding([row["input_ids"] for row in rows])

        def column(name: str) -> Tensor:
            fill = padding if name == "input_ids" else 0
            padded = [[*row[name], *[fill] * (width - len(row[name]))] for row in rows]
            return torch.tensor(padded, device=self._local.device)

        return {name: column(name) for name in rows[0]}

    def _padding(self, rows: Sequence[Sequence[int]]) -> int:
        """The token to pad with. Decoders find the end of a row by its value, so no row may hold it."""
        tokenizer = self._local.tokenizer
        token = tokenizer.pad_token_id
        if token is None or token == tokenizer.eos_token_id:
            used = {token for row in rows for token in row}
            token = next(i for i in count() if i not in used)
        self._local.model.config.get_text_config().pad_token_id = token
        return token


def _check_outputs(path: str, outputs: int | None) -> None:
    if outputs != 1:
        raise JudgeError(
            f"judge.path={path}: this model has {outputs} outputs, and a reward model has one (num_labels=1); wrap a "
            "classifier in a reward function of yours and write judge=function"
        )


class LanguageModelJudge(PairwiseJudge):
    """Asks a causal language model which completion is better, and compares the log-probabilities of ``A`` and ``B``.

    Nothing is generated: one forward pass answers one question. The question goes through the tokenizer's chat
    template where it has one.

    Args:
        path: Hugging Face folder or hub name.
        dtype: of the weights, a name of torch's; ``auto``: as they were saved.
        trust_remote_code: whether code in the model folder may run.
        device: torch's name of a device; ``None``: the GPU where there is one.
        batch_size: questions at a time.
        template: of the question; ``{prompt}``, ``{first}`` and ``{second}`` are filled in.
        margin: nats; log-probabilities that differ by no more are a tie.
        cache: file of the verdicts.
        max_unanswered: share of the questions that may stay without an answer, being longer than the model's context.

    Raises:
        ValueError: the template lacks a placeholder.
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
        self._local = LocalModel(AutoModelForCausalLM, path, dtype, trust_remote_code, device, batch_size)
        self.template, self.margin = check_template(template), margin

    @property
    def identity(self) -> dict[str, Any]:
        """Weights, question and margin."""
        return {
            "judge": "language_model",
            **self._local.identity,
            "template": self.template,
            "margin": self.margin,
        }

    @torch.no_grad()
    def ask(self, comparisons: Sequence[JudgedPair]) -> Generator[Mapping[JudgedPair, float | str], None, None]:
        """Answers a batch at a time.

        Raises:
            JudgeError: the tokenizer cannot tell A from B.
        """
        context = self._local.context
        questions = [self._encode(comparison) for comparison in comparisons]
        fitting = [i for i, (ids, _) in enumerate(questions) if len(ids) <= context]
        for i in set(range(len(questions))) - set(fitting):
            length = len(questions[i][0])
            yield {comparisons[i]: f"a question of {length} tokens exceeds the judge's context of {context}"}
        for batch in self._local.batches([questions[i][0] for i in fitting]):
            chosen = [fitting[i] for i in batch]
            differences = self._differences([questions[i] for i in chosen])
            yield {comparisons[i]: self._verdict(value) for i, value in zip(chosen, differences, strict=True)}

    def _verdict(self, difference: float) -> float:
        return 0.5 if abs(difference) <= self.margin else float(difference > 0)

    def _differences(self, questions: Sequence[tuple[list[int], tuple[int, int]]]) -> list[float]:
        """Of each question, how much more probable the answer A is than B, in nats."""
        lengths = torch.tensor([len(ids) for ids, _ in questions])
        ids = torch.zeros(len(questions), int(lengths.max()) + 1, dtype=torch.long)
        for row, (question_ids, (label, _)) in zip(ids, questions, strict=True):
            row[: len(question_ids) + 1] = torch.tensor([*question_ids, label])
        sequences = Sequences(ids, lengths, lengths + 1).to(self._local.device)
        logits = at_least_float32(completion_logits(self._local.model, sequences))
        labels = torch.tensor([labels for _, labels in questions], device=logits.device)
        first, second = logits.gather(-1, labels).unbind(-1)
        self.spend(calls=len(questions), tokens=int(lengths.sum()))
        return (first - second).tolist()

    def _encode(self, comparison: JudgedPair) -> tuple[list[int], tuple[int, int]]:
        """Tokens of the question, and the token of each answer: the first in which the two differ."""
        tokenizer, text = self._local.tokenizer, question(self.template, comparison).rstrip()
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": text}]
            # models that think before they answer are asked not to; other templates do not read it
            text = str(
                tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
            )
        gap = "" if text[-1:].isspace() else " "
        special = not tokenizer.chat_template
        first, second = (
            tokenizer(f"{text}{gap}{label}", add_special_tokens=special, verbose=False)["input_ids"] for label in "AB"
        )
        cut = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if cut is None:
            raise JudgeError(f"judge.path={self._local.path}: its tokenizer has the same tokens for A and B")
        return first[:cut], (first[cut], second[cut])
