"""Preference rows as text, which data sources yield and :mod:`spo.data.rendering` converts to tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from spo.errors import DataError

Message = dict[str, Any]
"""One turn of a conversation: ``role``, ``content``, and all other fields of the data such as ``tool_calls``.

``role`` is text. ``content`` is text, a list of text parts, or ``None`` if another field holds the message.
"""
Text = str | tuple[Message, ...]
"""Prompt or completion: plain text, or the turns of a conversation."""
Split = Literal["train", "selection", "test"]
SPLITS: tuple[Split, ...] = ("train", "selection", "test")


class RowError(DataError):
    """A row that cannot be used, with a message for the person who owns the file.

    Args:
        where: Place of the row, such as file and line.
        reason: Reason as a sentence without a period.
        column: Name of the column at fault, if it is one column.
    """

    def __init__(self, where: str, reason: str, column: str | None = None) -> None:
        self.where, self.reason, self.column = where, reason, column
        super().__init__(f"{where}: {f'column {column!r}: ' if column else ''}{reason}")


@dataclass(frozen=True)
class Row:
    """A preference pair, a ranked list, or a single completion: one with a label, or one of supervised data.

    Attributes:
        prompt: Text, or the messages before the completion (``{"role": ..., "content": ...}``).
        chosen: Better or only completion, in the form of ``prompt``; as messages, the turns that follow it.
        rejected: Worse completion; ``None`` for a single completion.
        preference: Probability that chosen is the better one; ``None`` means 1.
        weight: Non-negative weight of the pair; ``None`` means 1.
        split: Split that the source assigns; with ``None``, the hash of the prompt decides.
        where: Place that a person can open, such as file and line.
        worse: Completions of a ranked list after ``rejected``, each worse than the one before it.
        tools: Tools of a conversation for the chat template, or ``None``.
        template_kwargs: Arguments of the chat template that this row sets, or ``None``.
        label: Probability that a single completion is desirable; ``None`` for other data.
        columns: Values of the columns that the loss reads, by name: numbers, lists of numbers, and texts or messages of
            further completions.
    """

    prompt: Text
    chosen: Text
    rejected: Text | None = None
    preference: float | None = None
    weight: float | None = None
    split: Split | None = None
    where: str = ""
    worse: tuple[Text, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    label: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def completions(self) -> tuple[Text, ...]:
        """Return all completions, the best one first."""
        return (self.chosen, *(() if self.rejected is None else (self.rejected,)), *self.worse)


@dataclass(frozen=True)
class Completion:
    """A sampled completion.

    Attributes:
        text: Text without the end-of-text token.
        finished: Whether end-of-text was sampled before the length limit.
    """

    text: str
    finished: bool


@dataclass(frozen=True)
class Writer:
    """A model that writes completions, and how.

    Attributes:
        model: Folder of the model; ``None`` for the reference model.
        temperature: Temperature of the samples.
        top_p: Probability of the nucleus that the samples are drawn from; 1 for all tokens.
        number: Number that gives the samples random seeds of their own; ``None`` for those that every data set uses.
    """

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    number: int | None = None


@dataclass(frozen=True)
class PromptRequest:
    """A prompt to complete.

    Attributes:
        prompt: Text or messages.
        tools: Tools of a conversation for the chat template, or ``None``.
        template_kwargs: Arguments of the chat template, or ``None``.
    """

    prompt: Text
    tools: tuple[dict[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] | None = None


class Completer(Protocol):
    """Function that samples completions from a model."""

    def __call__(
        self, prompts: Sequence[str | PromptRequest], n: int, /, writer: Writer | None = None
    ) -> list[list[Completion]]:
        """Return ``n`` completions of each prompt.

        Args:
            prompts: Prompts to complete.
            n: Number of completions of each.
            writer: Model that writes them; ``None`` for the one that the source names.
        """


Reward = Callable[[Sequence[str], Sequence[str]], dict[str, list[float]]]
"""Function ``reward(prompts, completions)`` that scores each completion.

It returns lists of one number per completion: the key ``reward``, and a key for each component.
"""
