"""Needs of the loss, read from rows: the kind of data, numbers of a row, and further completions of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import c_float
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from spo.data.cells import describe_type, number_cell
from spo.data.messages import text_or_messages
from spo.data.rows import DataError, Row, RowError, Text

if TYPE_CHECKING:
    from spo.data.rendering import TokenizedPair
    from spo.losses import DataNeeds, Feature

Ids = tuple[int, ...]
Numbers = float | tuple[float, ...]
"""A number of a row, or several: one for each completion, or a list of numbers."""
Encode = Callable[["TokenizedPair", int, str], Ids]
"""Function ``encode(row, rank, text)`` that returns the tokens of a text in place of the completion of a rank."""
Draw = Callable[[Sequence[Ids], Sequence[int]], Sequence[Ids]]
"""Function ``draw(prompts, stop_ids)`` that samples one completion of each prompt from the reference model, in tokens.

``prompts`` holds the tokens of distinct prompts, and ``stop_ids`` the tokens that end a completion.
"""


def needs_pairs(needs: DataNeeds) -> bool:
    """Return whether a row without a label must have a rejected completion.

    A loss of labelled completions reads both completions of a pair, each with a label.
    """
    return needs.rejected or needs.labelled


def check_kind(row: Row, needs: DataNeeds) -> None:
    """Check that a row is of the kind that the loss reads.

    Raises:
        RowError: If the row has a label that the loss does not read, or lacks a completion or label that it reads.
    """
    if row.label is not None and not needs.labelled:
        raise RowError(row.where, "a single completion with a label, but method.loss does not read labels", "label")
    if row.label is None and row.rejected is None and needs_pairs(needs):
        what = "neither a label nor a rejected completion" if needs.labelled else "no rejected completion"
        raise RowError(row.where, f"there is {what}, which method.loss reads", "rejected")


def read_features(features: Mapping[str, Feature], row: Row, name_of: Callable[[str], str]) -> dict[str, Numbers]:
    """Return the numbers of a row that the loss declares, by the name of the feature.

    Args:
        features: Features by name.
        row: Row with the columns.
        name_of: Function from the name of a column to its name in the data, for messages.

    Raises:
        RowError: If a column is missing, or does not hold finite numbers, as many as the feature declares.
    """
    found: dict[str, Numbers] = {}
    for name, feature in features.items():
        values = [_number(name, feature, row, column, name_of(column)) for column in feature.columns]
        found[name] = tuple(values) if feature.per_completion else values[0]  # type: ignore[arg-type]
    return found


def _number(name: str, feature: Feature, row: Row, column: str, column_name: str) -> Numbers:
    value = row.columns.get(column)
    if value is None:
        if feature.default is not None:
            return float(feature.default)
        raise RowError(row.where, f"missing; method.loss reads it as the feature {name!r}", column_name)

    def number(cell: object) -> float:
        found = number_cell(cell, row.where, column_name)
        # A rounded name, such as that of an annotator, would be the name of another.
        if isinstance(cell, int) and c_float(found).value != cell:
            reason = f"float32, in which a loss reads it, would round {cell}: subtract an offset, or number from 0"
            raise RowError(row.where, reason, column_name)
        return found

    if feature.size is None:
        return number(value)
    if not isinstance(value, (list, tuple)):
        reason = f"must be a list of {feature.size} numbers, not {describe_type(value)}"
        raise RowError(row.where, reason, column_name)
    if len(value) != feature.size:
        raise RowError(row.where, f"must have {feature.size} numbers, not {len(value)}", column_name)
    return tuple(map(number, value))


def read_text(row: Row, name: str, column_name: str) -> Text:
    """Return a further completion of the prompt, from a column of the row.

    Args:
        row: Row with the column.
        name: Name of the column.
        column_name: Name of the column in the data, for messages.

    Raises:
        RowError: If the column is missing, or is not in the form of the prompt.
    """
    if row.columns.get(name) is None:
        raise RowError(row.where, "missing; method.loss reads it as a further completion", column_name)
    text = text_or_messages(row.columns[name], row.where, column_name)
    if isinstance(text, str) != isinstance(row.prompt, str) or text == ():
        raise RowError(row.where, "must be a completion in the form of the prompt", column_name)
    return text


def check_rows(rows: Sequence[Row], needs: DataNeeds, name_of: Callable[[str], str]) -> None:
    """Check that rows have all that the loss reads, before their tokens are known.

    Args:
        rows: Rows of the data.
        needs: Needs of the loss.
        name_of: Function from the name of a column to its name in the data, for messages.

    Raises:
        RowError: If a row lacks something, or has a malformed value.
    """
    for row in rows:
        check_kind(row, needs)
        read_features(needs.features, row, name_of)
        for name in needs.text_columns:
            read_text(row, name, name_of(name))


def as_labelled(pair: TokenizedPair) -> list[TokenizedPair]:
    """Return a pair as its two completions with their labels, or a labelled completion as it is.

    The probability p that chosen is better labels it; the label of rejected is 1 - p.
    """
    if pair.label is not None:
        return [pair]
    assert pair.rejected_ids is not None and pair.rejected_text is not None
    preference = 1.0 if pair.preference is None else pair.preference
    alone = replace(pair, rejected_ids=None, rejected_text=None, preference=None)
    rejected = replace(alone, chosen_ids=pair.rejected_ids, chosen_text=pair.rejected_text, label=1.0 - preference)
    return [replace(alone, label=preference), rejected]


def supervised(rows: Sequence[Row]) -> list[Row]:
    """Return rows of the best completions alone, those of labelled data that are desirable.

    Raises:
        DataError: If no completion is desirable.
    """
    best = [replace(row, rejected=None, worse=(), label=None, columns={}) for row in rows if is_desirable(row.label)]
    if not best:
        raise DataError("no completion has a label above 0.5, so there is nothing to fine-tune on: set sft.max_steps=0")
    return best


def is_desirable(label: float | None) -> bool:
    """Return whether a completion is one to learn from: the best one of its row, or one with a label above 0.5."""
    return label is None or label > 0.5


@dataclass(frozen=True)
class SplitRows:
    """Rows of a split, from which further completions are made, see :class:`spo.losses.declarations.RoleInputs`.

    Attributes:
        rows: Rows of the split; the texts of columns are among their further completions.
        stop_ids: Tokens that end a completion.
        sampler: Function that draws completions, or ``None`` where there is no reference model.
        encode: Function that encodes a text like a completion.
    """

    rows: Sequence[TokenizedPair]
    stop_ids: Sequence[int]
    sampler: Draw | None
    encode: Encode

    @property
    def prompt_ids(self) -> list[str]:
        """Return the digest of the prompt of each row."""
        return [row.prompt_id for row in self.rows]

    @property
    def completions(self) -> list[Ids]:
        """Return the tokens of the best or only completion of each row."""
        return [row.chosen_ids for row in self.rows]

    def column(self, name: str) -> list[Ids]:
        """Return the tokens of a text column of each row as a completion of its prompt.

        Raises:
            ValueError: If the role does not declare the column.
        """
        if any(name not in row.extra for row in self.rows):
            raise ValueError(f"it reads the column {name!r}, but its text_columns do not list it")
        return [row.extra[name] for row in self.rows]

    def draw(self) -> list[Ids]:
        """Return one completion of each prompt, drawn from the reference model.

        Raises:
            ValueError: If there is no reference model.
        """
        if self.sampler is None:
            raise ValueError("it is drawn from the reference model, and there is none here")
        prompts = list(dict.fromkeys(row.prompt_ids for row in self.rows))
        drawn = dict(zip(prompts, self.sampler(prompts, self.stop_ids), strict=True))
        return [drawn[row.prompt_ids] for row in self.rows]

    def edited(self, rank: int, edit: Callable[[str], str]) -> list[Ids]:
        """Return the tokens of a completion of each row after an edit of its text, see :class:`RoleInputs`."""
        found = []
        for row in self.rows:
            text = edit(row.texts[rank])
            found.append(row.completions[rank] if text == row.texts[rank] else self.encode(row, rank, text))
        return found


def further_completions(needs: DataNeeds, rows: SplitRows, split: str) -> list[TokenizedPair]:
    """Return the rows of a split with the further completions that the loss declares, by their names.

    Args:
        needs: Needs of the loss.
        rows: Rows of the split.
        split: Name of the split, for messages.

    Raises:
        DataError: If a completion cannot be made of these rows.
    """
    made: dict[str, Sequence[Ids]] = {}
    for name, role in needs.extra_completions.items() if rows.rows else ():
        key = f"method.loss: the further completion {name!r} of the {split} split"
        try:
            made[name] = [tuple(map(int, ids)) for ids in role.tokens(rows)]
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{key}: {error}") from error
        if len(made[name]) != len(rows.rows) or not all(made[name]):
            raise DataError(f"{key}: tokens() must return the tokens of one completion, at least one, for each row")
    return [replace(row, extra={name: made[name][i] for name in made}) for i, row in enumerate(rows.rows)]
