"""What a data source yields: preference rows as text, before any tokenizer has seen them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from spo.errors import DataError

Message = dict[str, str]
Text = str | tuple[Message, ...]
Split = Literal["train", "selection", "test"]
SPLITS: tuple[Split, ...] = ("train", "selection", "test")


class RowError(DataError):
    """A row that cannot be used, with where it is and why, in words for the person who owns the file."""

    def __init__(self, where: str, reason: str, column: str | None = None) -> None:
        self.where, self.reason, self.column = where, reason, column
        super().__init__(f"{where}: {f'column {column!r}: ' if column else ''}{reason}")


@dataclass(frozen=True)
class Row:
    """One preference pair, a ranked list, or one completion where ``rejected`` is ``None`` (supervised data).

    Attributes:
        prompt: text, or the messages before the completion (``{"role": ..., "content": ...}``).
        chosen: the better completion, in the form of ``prompt`` (messages: the turns that follow it).
        rejected: the worse completion, or ``None``.
        preference: probability that chosen is the better one; ``None`` means 1.
        weight: non-negative weight of the pair; ``None`` means 1.
        split: the split the source assigns, or ``None`` to let the prompt's hash decide.
        where: file and line (or the like) that a person can open.
        worse: of a ranked list, the completions after ``rejected``, each worse than the one before it.
    """

    prompt: Text
    chosen: Text
    rejected: Text | None = None
    preference: float | None = None
    weight: float | None = None
    split: Split | None = None
    where: str = ""
    worse: tuple[Text, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A sampled completion; ``finished`` is false where it was cut at the length limit before its end-of-text."""

    text: str
    finished: bool


Completer = Callable[[Sequence[str], int], list[list[Completion]]]
"""``complete(prompts, n)``: ``n`` completions of each prompt, sampled from the reference model."""


Reward = Callable[[Sequence[str], Sequence[str]], dict[str, list[float]]]
"""``reward(prompts, completions)``: the key ``reward`` and any components, one number per completion."""
