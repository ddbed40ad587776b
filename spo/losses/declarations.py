"""Declarations of a loss: its needs besides the summed log-probabilities of its completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from spo.types import LabelledLogps, ListLogps, Logps, PairLogps

if TYPE_CHECKING:
    from spo.losses.base import Loss
    from spo.objective import ScoredBatch

Ids = tuple[int, ...]


class Term(NamedTuple):
    """A number of each completion that a loss computes from token log-probs or logits.

    Attributes:
        compute: Function of a scored batch to ``(n, B)``, best completions first, such as
            ``lambda scored: scored.per_completion(scored.policy_tokens)``. Gradients flow through it unless it detaches
            them. The policy and the reference are not run again.
        needs_reference_logits: Whether ``compute`` reads ``reference`` or ``reference_tokens`` of the scored batch.
        needs_policy_states: Whether ``compute`` reads ``policy_states`` or ``prompt_states`` of the scored batch.
    """

    compute: Callable[[ScoredBatch], Tensor]
    needs_reference_logits: bool = False
    needs_policy_states: bool = False


Make = Callable[[Sequence[str], Sequence[str] | None], Sequence[float | Sequence[float]]]
"""Function ``make(prompts, completions)`` of texts that returns the numbers of rows, or of completions."""


@dataclass(frozen=True)
class Feature:
    """Numbers of a row that a loss reads.

    A number of each completion has the shape ``(B, 2)`` for pairs, ``(B, n)`` for lists, and ``(B,)`` for labelled
    completions.

    Attributes:
        column: Name of the column. A pair of names declares one number for each completion of a pair, chosen first.
        size: Length of the list of numbers that the column holds; ``None`` for a single number.
        default: Number for rows without the column; without it and without ``make``, the column is required.
        each: Whether there is a number for each completion. Pairs then have the columns ``chosen_NAME`` and
            ``rejected_NAME``, labelled completions have ``NAME``, and ranked lists have ``NAMEs``, a list of numbers in
            the order of ``responses``.
        make: Function ``make(prompts, completions)`` that computes the numbers of rows without the column from texts,
            for all of them in a split at once. ``completions`` is ``None`` unless there is a number for each
            completion; otherwise both have one text for each number.
    """

    column: str | tuple[str, str]
    size: int | None = None
    default: float | None = None
    each: bool = False
    make: Make | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (self.size < 1 or self.default is not None or self.per_completion):
            raise ValueError("size must be positive; a feature with a size has one column and no default")
        if self.each and not isinstance(self.column, str):
            raise ValueError("each=True takes one name as column, from which the names of the columns are made")
        if self.make is not None and self.default is not None:
            raise ValueError("make computes the numbers of rows without the column, so it does not take a default")

    @property
    def per_completion(self) -> bool:
        """Return whether there is a number for each completion."""
        return self.each or not isinstance(self.column, str)

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns in data of pairs."""
        if not isinstance(self.column, str):
            return self.column
        return (f"chosen_{self.column}", f"rejected_{self.column}") if self.each else (self.column,)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Return the names of the columns in data of labelled completions."""
        return (self.column,) if isinstance(self.column, str) else self.column

    @property
    def list_columns(self) -> tuple[str, ...]:
        """Return the names of the columns in data of ranked lists."""
        return (f"{self.column}s",) if self.each else self.label_columns


class RoleInputs(Protocol):
    """Rows of a split, from which further completions are made."""

    @property
    def prompt_ids(self) -> Sequence[str]:
        """Return the digest of the prompt of each row."""

    @property
    def completions(self) -> Sequence[Ids]:
        """Return the tokens of the best or only completion of each row."""

    def column(self, name: str) -> Sequence[Ids]:
        """Return the tokens of a text column of each row as a completion of its prompt."""

    def draw(self) -> Sequence[Ids]:
        """Return one completion of each prompt, drawn from the reference model once and cached."""

    def edited(self, rank: int, edit: Callable[[str], str]) -> Sequence[Ids]:
        """Return the tokens of a completion of each row after an edit of its text.

        Args:
            rank: Rank of the completion in its row, 0 for the best or only one.
            edit: Function from the text to the edited text. An unchanged text keeps its tokens.
        """


@dataclass(frozen=True)
class Role(ABC):
    """A further completion of each prompt. To write one, derive from this class and write :meth:`tokens`.

    Attributes:
        gradient: Whether gradients flow through the policy's log-prob of the completion.
        text_columns: Text columns of the rows that it reads.
    """

    gradient: bool = field(default=False, kw_only=True)

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return the names of the text columns that it reads."""
        return ()

    @abstractmethod
    def tokens(self, rows: RoleInputs) -> Sequence[Ids]:
        """Return the tokens of the further completion of each row."""


@dataclass(frozen=True)
class Column(Role):
    """A completion that a text column of the data holds, such as an anchor response.

    Attributes:
        name: Name of the column.
    """

    name: str

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return the name of the column."""
        return (self.name,)

    def tokens(self, rows: RoleInputs) -> Sequence[Ids]:
        """Return the tokens of the column."""
        return rows.column(self.name)


@dataclass(frozen=True)
class Mismatched(Role):
    """The completion of a row before it in the split, in a circle, that has another prompt (KTO).

    The rows of a prompt go backwards through those of the prompt before. So the chosen and the rejected completion of a
    pair, which are two rows, get the rejected and the chosen one of another.
    """

    def tokens(self, rows: RoleInputs) -> Sequence[Ids]:
        """Return the completion of another prompt for each row.

        Raises:
            ValueError: All rows have the same prompt.
        """
        prompts, count = rows.prompt_ids, len(rows.prompt_ids)
        if count and len(set(prompts)) == 1:
            raise ValueError(
                "mismatched completions need rows with two prompts: add rows, or set a larger share in data.splits"
            )
        # Places of the rows of each prompt that follow each other; the walk around the circle starts with a new prompt.
        start = next((i for i in range(count) if prompts[i] != prompts[i - 1]), 0)
        runs: list[list[int]] = []
        for i in (j % count for j in range(start, start + count)):
            if not runs or prompts[i] != prompts[i - 1]:
                runs.append([])
            runs[-1].append(i)
        other = [0] * count
        for run, before in zip(runs, runs[-1:] + runs[:-1], strict=True):
            for place, i in enumerate(run):
                other[i] = before[-1 - place % len(before)]
        return [rows.completions[j] for j in other]


@dataclass(frozen=True)
class Drawn(Role):
    """A completion that is drawn from the reference model once, with the seed of the data, and cached."""

    def tokens(self, rows: RoleInputs) -> Sequence[Ids]:
        """Return the drawn completions."""
        return rows.draw()


@dataclass(frozen=True)
class DataNeeds:
    """Needs of a loss that the data has to meet.

    Attributes:
        inputs: Shape of the log-probs that the loss reads, which decides what kind of data fits.
        rejected: Whether the loss reads the rejected completion of a pair.
        features: Numbers of a row by name.
        extra_completions: Further completions by name.
    """

    inputs: type[Logps] = PairLogps
    rejected: bool = True
    features: Mapping[str, Feature] = field(default_factory=dict)
    extra_completions: Mapping[str, Role] = field(default_factory=dict)

    @classmethod
    def of(cls, loss: Loss) -> DataNeeds:
        """Return the needs that a loss declares."""
        return cls(loss.inputs, loss.uses_rejected, dict(loss.features), dict(loss.extra_completions))

    @property
    def labelled(self) -> bool:
        """Return whether the loss reads single completions with labels."""
        return self.inputs is LabelledLogps

    @property
    def lists(self) -> bool:
        """Return whether the loss reads lists of completions."""
        return self.inputs is ListLogps

    @property
    def number_columns(self) -> tuple[str, ...]:
        """Return the columns with numbers in data of pairs, each once."""
        return _each_once(one.columns for one in self.features.values())

    @property
    def label_number_columns(self) -> tuple[str, ...]:
        """Return the columns with numbers in data of labelled completions, each once."""
        return _each_once(one.label_columns for one in self.features.values())

    @property
    def list_number_columns(self) -> tuple[str, ...]:
        """Return the columns with numbers in data of ranked lists, each once."""
        return _each_once(one.list_columns for one in self.features.values())

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Return the columns of pairs without which the loss cannot be computed, each once."""
        required = [one.columns for one in self.features.values() if one.default is None and one.make is None]
        return _each_once([*required, self.text_columns])

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Return the columns with texts, each once."""
        return _each_once(role.text_columns for role in self.extra_completions.values())


def _each_once(columns: Iterable[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in columns for name in names))
