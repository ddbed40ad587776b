"""Preference rows from tables of records in TRL's formats, checked row by row.

One loop decides what a bad row does: it stops the run, or it is skipped, counted and listed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from spo.bounds import OnBadRow
from spo.data.cells import is_empty, kind_of, shared_messages, shared_text, text_or_messages
from spo.data.readers import Record
from spo.data.rows import Completer, DataError, Row, RowError, Split, Text
from spo.data.source import Source

COLUMNS = ("prompt", "chosen", "rejected", "preference", "weight")


class NoPreference(RowError):
    """A well-formed row that says nothing: an empty completion, or chosen equal to rejected.

    Published data sets hold a few of them, so they never stop a run: they are skipped, counted and listed.
    """


class TableSource(Source):
    """A source of records with the columns ``chosen``, ``rejected`` and perhaps ``prompt``, ``preference``, ``weight``.

    Other columns are ignored. After `rows`, ``bad_rows`` lists what was skipped and ``counts`` holds ``read`` and
    ``skipped``.

    Args:
        on_bad_row: ``stop`` raises at the first malformed row, ``skip`` skips, counts and lists it.
        columns: the data's own name for each of our columns that it calls otherwise, or ``None``.
    """

    known: ClassVar[tuple[str, ...]] = COLUMNS

    def __init__(self, on_bad_row: OnBadRow, columns: Mapping[str, str] | None) -> None:
        if on_bad_row not in ("stop", "skip"):
            raise DataError(f"data.on_bad_row={on_bad_row}: choose stop or skip")
        if unknown := set(columns or {}) - set(self.known):
            raise DataError(
                f"data.source.columns: unknown {sorted(unknown)}; it maps {', '.join(self.known)} to the data's names"
            )
        super().__init__()
        self.on_bad_row = on_bad_row
        self.columns = dict(columns or {})
        self.counts: dict[str, int] = {"read": 0, "skipped": 0}

    @property
    @abstractmethod
    def name(self) -> str:
        """What a person calls this data."""

    @abstractmethod
    def records(self) -> Iterator[tuple[str, Split | None, Record | RowError]]:
        """Where each record stands, the split that the source assigns to it, and the record."""

    def rows(self, complete: Completer) -> list[Row]:
        """The rows that can be used.

        Args:
            complete: not called; this source brings its own completions.

        Raises:
            RowError: at the first malformed row, when ``on_bad_row`` is ``stop``.
            DataError: when the data is missing, or none of it can be used.
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
                if self.on_bad_row == "stop" and not isinstance(error, NoPreference):
                    raise
                self.bad_rows.append(error)
        self.counts = {"read": read, "skipped": len(self.bad_rows)}
        if not rows:
            first = f"; the first problem: {self.bad_rows[0]}" if self.bad_rows else ""
            raise DataError(f"{self.name}: none of its {read} rows can be used{first}")
        return rows

    def parse(self, record: Record, where: str, split: Split | None) -> Row:
        """One record as a row.

        Raises:
            RowError: with the column and the reason.
        """
        chosen, rejected = (self._text(record, name, where) for name in ("chosen", "rejected"))
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise RowError(where, "one of chosen and rejected is text, the other a list of messages", "rejected")
        named = self.columns.get("prompt", "prompt")
        prompt: Text | None = None
        if "prompt" in self.columns or record.get(named) is not None:
            prompt = self._text(record, "prompt", where)
        # A text prompt beside message lists repeats what the lists already begin with (UltraFeedback's form).
        if prompt is None or (isinstance(prompt, str) and not isinstance(chosen, str)):
            prompt, chosen, rejected = self.split_prompt(chosen, rejected, where)
        elif isinstance(chosen, str) and not isinstance(prompt, str):
            raise RowError(where, "a list of messages, but the completions are text", named)
        for name, completion in (("chosen", chosen), ("rejected", rejected)):
            if is_empty(completion):
                raise NoPreference(where, "the completion is empty", self.columns.get(name, name))
        if chosen == rejected:
            raise NoPreference(where, "chosen and rejected are equal", self.columns.get("rejected", "rejected"))
        preference = self._number(record, "preference", where, 1.0)
        weight = self._number(record, "weight", where, math.inf)
        return Row(prompt, chosen, rejected, preference, weight, split, where)

    def split_prompt(self, chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
        """Cuts two whole texts (or conversations) into their shared prompt and the two completions."""
        if isinstance(chosen, str) and isinstance(rejected, str):
            cut = shared_text(chosen, rejected)
        else:
            cut = shared_messages(chosen, rejected)  # type: ignore[arg-type]
        return chosen[:cut], chosen[cut:], rejected[cut:]

    def _text(self, record: Record, name: str, where: str) -> Text:
        column = self.columns.get(name, name)
        if column not in record:
            raise RowError(where, f"missing; the row has {', '.join(map(str, record)) or 'no columns'}", column)
        return text_or_messages(record[column], where, column)

    def _number(self, record: Record, name: str, where: str, highest: float) -> float | None:
        column = self.columns.get(name, name)
        value = record.get(column)
        if value is None:
            if name in self.columns and column not in record:
                raise RowError(where, f"missing; the row has {', '.join(map(str, record))}", column)
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RowError(where, f"must be a number, not {kind_of(value)}", column)
        # Written so that NaN fails it.
        if not 0 <= value <= highest or value == math.inf:
            allowed = "between 0 and 1" if highest == 1 else "finite and not negative"
            raise RowError(where, f"must be {allowed}, not {value}", column)
        return float(value)
