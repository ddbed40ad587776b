"""Preference rows from tables of records in TRL's formats, checked row by row.

One loop, :meth:`TableSource.rows`, decides whether a bad row stops the run or is skipped, counted and listed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from spo.bounds import OnBadRow
from spo.data.cells import count_shared_messages, describe_type, is_empty, shared_prompt_length, text_or_messages
from spo.data.readers import Record
from spo.data.rows import Completer, DataError, Row, RowError, Split, Text
from spo.data.source import Source

COLUMNS = ("prompt", "chosen", "rejected", "preference", "weight")
"""Columns that a table of pairs may have."""


class NoPreference(RowError):
    """A well-formed row without a preference: a completion is empty, or chosen equals rejected.

    Published data sets contain a few such rows. They never stop a run: they are skipped, counted and listed.
    """


class TableSource(Source):
    """A source of records with the columns ``chosen`` and ``rejected``.

    The columns ``prompt``, ``preference`` and ``weight`` are optional, and other columns are ignored.

    Args:
        on_bad_row: Policy for a malformed row: ``stop`` raises its error; ``skip`` skips, counts and lists the row.
        columns: Mapping from names in :attr:`known` to the data's own column names, where these differ.

    Attributes:
        known: Names of the columns that this source reads.
        counts: Number of rows that the last call of :meth:`rows` ``read`` and ``skipped``.
    """

    known: ClassVar[tuple[str, ...]] = COLUMNS

    def __init__(self, on_bad_row: OnBadRow, columns: Mapping[str, str] | None) -> None:
        if on_bad_row not in ("stop", "skip"):
            raise DataError(f"data.on_bad_row={on_bad_row}: choose stop or skip")
        if unknown := set(columns or {}) - set(self.known):
            raise DataError(f"data.source.columns: unknown {sorted(unknown)}; choose from {', '.join(self.known)}")
        super().__init__()
        self.on_bad_row = on_bad_row
        self.columns = dict(columns or {})
        self.counts: dict[str, int] = {"read": 0, "skipped": 0}

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the name of the data for messages."""

    @abstractmethod
    def records(self) -> Iterator[tuple[str, Split | None, Record | RowError]]:
        """Yield the place of each record, the split that the source assigns to it, and the record.

        A record that cannot be read is yielded as the error that says why.
        """

    def rows(self, complete: Completer) -> list[Row]:
        """Return the usable rows.

        Args:
            complete: Ignored, since the records contain completions.

        Raises:
            RowError: If a row is malformed and ``on_bad_row`` is ``stop``.
            DataError: If the data is missing, or if no row can be used.
        """
        rows: list[Row] = []
        self.bad_rows = []
        read = 0
        for where, split, record in self.records():
            read += 1
            try:
                if isinstance(record, RowError):
                    raise record
                rows.append(self.parse(record, where, split))
            except RowError as error:
                # A row without a preference is not the sign of a wrong file or column, so it never stops a run.
                if self.on_bad_row == "stop" and not isinstance(error, NoPreference):
                    raise
                self.bad_rows.append(error)
        self.counts = {"read": read, "skipped": len(self.bad_rows)}
        if not rows:
            first = f"; the first problem: {self.bad_rows[0]}" if self.bad_rows else ""
            raise DataError(f"{self.name}: none of its {read} rows can be used{first}")
        return rows

    def parse(self, record: Record, where: str, split: Split | None) -> Row:
        """Convert a record to a row.

        Args:
            record: Values by column name.
            where: Place of the record for messages, such as file and line.
            split: Split that the source assigns to the record, or ``None``.

        Raises:
            RowError: If the record is malformed, with the column and the reason.
            NoPreference: If a completion is empty, or if both are equal.
        """
        chosen, rejected = (self._text(record, name, where) for name in ("chosen", "rejected"))
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise RowError(where, "one of chosen and rejected is text, the other a list of messages", "rejected")
        column = self.columns.get("prompt", "prompt")
        prompt: Text | None = None
        # A column that the user mapped must exist; an unmapped prompt may be absent or null.
        if "prompt" in self.columns or record.get(column) is not None:
            prompt = self._text(record, "prompt", where)
        # In UltraFeedback's form, chosen and rejected are whole conversations that already begin with the prompt.
        if prompt is None or (isinstance(prompt, str) and not isinstance(chosen, str)):
            prompt, chosen, rejected = self.split_prompt(chosen, rejected, where)
        elif isinstance(chosen, str) and not isinstance(prompt, str):
            raise RowError(where, "a list of messages, but the completions are text", column)
        for name, completion in (("chosen", chosen), ("rejected", rejected)):
            if is_empty(completion):
                raise NoPreference(where, "the completion is empty", self.columns.get(name, name))
        if chosen == rejected:
            raise NoPreference(where, "chosen and rejected are equal", self.columns.get("rejected", "rejected"))
        preference = self._number(record, "preference", where, 1.0)
        weight = self._number(record, "weight", where, math.inf)
        return Row(prompt, chosen, rejected, preference, weight, split, where)

    def split_prompt(self, chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
        """Split two whole texts or conversations into the shared prompt and the two completions.

        Args:
            chosen: Prompt and better completion.
            rejected: Prompt and worse completion, in the same form.
            where: Place of the record for messages.

        Returns:
            Prompt, better completion and worse completion.
        """
        if isinstance(chosen, str) and isinstance(rejected, str):
            cut = shared_prompt_length(chosen, rejected)
        else:
            cut = count_shared_messages(chosen, rejected)  # type: ignore[arg-type]
        return chosen[:cut], chosen[cut:], rejected[cut:]

    def _text(self, record: Record, name: str, where: str) -> Text:
        column, value = self._required(record, name, where)
        return text_or_messages(value, where, column)

    def _required(self, record: Record, name: str, where: str) -> tuple[str, Any]:
        """Return the data's name of a column, and its value in a record that must have it."""
        column = self.columns.get(name, name)
        if column not in record:
            raise RowError(where, f"missing; the row has {', '.join(map(str, record)) or 'no columns'}", column)
        return column, record[column]

    def _number(self, record: Record, name: str, where: str, highest: float) -> float | None:
        column = self.columns.get(name, name)
        value = record.get(column)
        if value is None:
            if name in self.columns and column not in record:
                raise RowError(where, f"missing; the row has {', '.join(map(str, record))}", column)
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RowError(where, f"must be a number, not {describe_type(value)}", column)
        # The comparison is negated because NaN fails every comparison.
        if not 0 <= value <= highest or value == math.inf:
            allowed = "between 0 and 1" if highest == 1 else "finite and not negative"
            raise RowError(where, f"must be {allowed}, not {value}", column)
        return float(value)
