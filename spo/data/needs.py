"""Needs of the loss, read from rows: the kind of data, numbers of a row, and further completions of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import c_float
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spo.data.cells import LARGEST_NUMBER, describe_type, number_cell
from spo.data.messages import message_text, text_or_messages
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


def read_features(
    features: Mapping[str, Feature], row: Row, name_of: Callable[[str], str]
) -> tuple[dict[str, Numbers], dict[str, tuple[float, ...]]]:
    """Return the numbers of a row that the loss declares, and those of each completion, by the name of the feature.

    Args:
        features: Features by name.
        row: Row with the columns.
        name_of: Function from the name of a column to its name in the data, for messages.

    Returns:
        Numbers of the row, and numbers of each completion, the best one first. The number of a labelled completion is
        one of its row. Numbers that :func:`make_features` computes are absent.

    Raises:
        RowError: If a column is missing, or does not hold finite numbers, as many as the feature declares.
    """
    of_row: dict[str, Numbers] = {}
    of_completions: dict[str, tuple[float, ...]] = {}
    for name, feature in features.items():
        if not feature.per_completion or row.label is not None:
            [column] = feature.label_columns
            value = _number(name, feature, row, column, name_of(column))
            if value is not None:
                of_row[name] = value
        elif (values := _numbers_of_completions(name, feature, row, name_of)) is not None:
            of_completions[name] = values
    return of_row, of_completions


def _numbers_of_completions(
    name: str, feature: Feature, row: Row, name_of: Callable[[str], str]
) -> tuple[float, ...] | None:
    """Return a number of each completion, the best one first; ``None`` if they are to be computed."""
    count, columns = len(row.completions), feature.columns
    [*listed] = feature.list_columns if feature.each else ()
    # The source of lists reads no column of a pair, and has sorted the numbers as the completions.
    if listed and (row.worse or (listed[0] in row.columns and not row.columns.keys() & set(columns))):
        values = row.columns.get(listed[0])
        if values is not None:
            return tuple(number_of(value, row.where, name_of(listed[0])) for value in values[:count])
        columns = tuple(listed) * count
    if count > len(columns):
        reason = f"method.loss reads the feature {name!r} of pairs, and the row has {count} completions"
        raise RowError(row.where, reason, name_of(columns[0]))
    given = [_number(name, feature, row, column, name_of(column)) for column in columns[:count]]
    found = tuple(value for value in given if isinstance(value, float))
    if 0 < len(found) < count:
        missing, other = (columns[given.index(None)], columns[given.index(found[0])])
        raise RowError(row.where, f"missing, but {name_of(other)!r} is there: give both or neither", name_of(missing))
    return found or None


def _number(name: str, feature: Feature, row: Row, column: str, column_name: str) -> Numbers | None:
    """Return what a column holds, ``None`` if it is to be computed."""
    value = row.columns.get(column)
    if value is None:
        if feature.make is not None:
            return None
        if feature.default is not None:
            return float(feature.default)
        reason = f"missing; method.loss reads it as the feature {name!r} (data.source.columns maps other names)"
        raise RowError(row.where, reason, column_name)
    if feature.size is None:
        return number_of(value, row.where, column_name)
    return numbers_of(value, feature.size, row.where, column_name)


def number_of(cell: object, where: str, column: str) -> float:
    """Return a finite number that float32 can hold without rounding an integer.

    Raises:
        RowError: If the value is something else.
    """
    found = number_cell(cell, where, column)
    # A rounded name, such as that of an annotator, would be the name of another.
    if isinstance(cell, int) and c_float(found).value != cell:
        reason = f"float32, in which a loss reads it, would round {cell}: subtract an offset, or number from 0"
        raise RowError(where, reason, column)
    return found


def numbers_of(cell: object, size: int, where: str, column: str, what: str = "") -> tuple[float, ...]:
    """Return a list of finite numbers.

    Args:
        cell: Value of the column.
        size: Length of the list.
        where: Place of the record for messages, such as file and line.
        column: Name of the column.
        what: Words after the length in messages, such as `` for 3 responses``.

    Raises:
        RowError: If the value is something else.
    """
    if not isinstance(cell, (list, tuple)):
        raise RowError(where, f"must be a list of {size} numbers{what}, not {describe_type(cell)}", column)
    if len(cell) != size:
        raise RowError(where, f"must have {size} numbers{what}, not {len(cell)}", column)
    return tuple(number_of(value, where, column) for value in cell)


def make_features(features: Mapping[str, Feature], pairs: Sequence[TokenizedPair], split: str) -> list[TokenizedPair]:
    """Return the rows of a split with the numbers that features compute from texts, where rows do not have them.

    Args:
        features: Features by name.
        pairs: Rows of the split.
        split: Name of the split, for messages.

    Raises:
        DataError: If a feature does not compute finite numbers, as many as it declares.
    """
    made = list(pairs)
    for name, feature in features.items():
        lacking = [i for i, pair in enumerate(made) if name not in pair.features and name not in pair.numbers]
        if feature.make is None or not lacking:
            continue
        texts_of = [made[i].texts if feature.per_completion else ("",) for i in lacking]
        prompts = [_prompt_text(made[i]) for i, texts in zip(lacking, texts_of, strict=True) for _ in texts]
        completions = [text for texts in texts_of for text in texts] if feature.per_completion else None
        values = iter(_made(name, feature, prompts, completions, split))
        for i in lacking:
            if not feature.per_completion:
                made[i] = replace(made[i], features={**made[i].features, name: next(values)})
                continue
            numbers = tuple(next(values) for _ in made[i].texts)
            if made[i].label is None:
                made[i] = replace(made[i], numbers={**made[i].numbers, name: numbers})
            else:
                made[i] = replace(made[i], features={**made[i].features, name: numbers[0]})
    return made


def _made(
    name: str, feature: Feature, prompts: Sequence[str], completions: Sequence[str] | None, split: str
) -> list[Any]:
    """Return what ``make`` of a feature computes, one number or list of numbers for each prompt."""
    assert feature.make is not None
    key = f"method.loss: make of the feature {name!r}, for the {split} split"
    try:
        values = list(feature.make(prompts, completions))
    except ValueError as error:
        raise DataError(f"{key}: {error}") from error
    if len(values) != len(prompts):
        raise DataError(f"{key}: it must return one value for each of {len(prompts)} texts, not {len(values)}")
    return [_checked(value, feature.size, key) for value in values]


def _checked(value: Any, size: int | None, key: str) -> Numbers:
    try:
        numbers = (float(value),) if size is None else tuple(map(float, value))
    except (TypeError, ValueError):
        numbers = ()
    # The comparison is negated because NaN fails every comparison.
    if len(numbers) != (size or 1) or not all(abs(number) <= LARGEST_NUMBER for number in numbers):
        what = "a finite number" if size is None else f"a list of {size} finite numbers"
        raise DataError(f"{key}: it must return {what} for each text, not {value!r:.80}")
    return numbers[0] if size is None else numbers


def _prompt_text(pair: TokenizedPair) -> str:
    """Return the prompt of a row as text; of a conversation, the contents of its messages, one after the other."""
    return "\n".join(map(message_text, pair.prompt_messages)) if pair.prompt_messages else pair.prompt_text


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

    The probability p that chosen is better labels it; the label of rejected is 1 - p. Each has its own numbers.
    """
    if pair.label is not None:
        return [pair]
    assert pair.rejected_ids is not None and pair.rejected_text is not None
    preference = 1.0 if pair.preference is None else pair.preference
    chosen, rejected = ({**pair.features, **{name: pair.numbers[name][i] for name in pair.numbers}} for i in (0, 1))
    alone = replace(pair, rejected_ids=None, rejected_text=None, preference=None, numbers={})
    return [
        replace(alone, label=preference, features=chosen),
        replace(
            alone,
            chosen_ids=pair.rejected_ids,
            chosen_text=pair.rejected_text,
            label=1.0 - preference,
            features=rejected,
        ),
    ]


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
