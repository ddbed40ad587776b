"""Preference rows from tables of records in TRL's formats, checked row by row.

One loop, :meth:`TableSource.rows`, decides whether a bad row stops the run or is skipped, counted and listed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar

from spo.bounds import OnBadRow
from spo.data.cells import number_cell, template_kwargs, tool_list
from spo.data.findings import Findings
from spo.data.messages import is_empty, text_or_messages
from spo.data.needs import needs_pairs
from spo.data.prompts import (
    Candidate,
    follow_prompt,
    remove_repeated_texts,
    separate_prompt,
    shared_prompt_length,
    split_conversations,
)
from spo.data.readers import Record
from spo.data.rendering import prompt_id
from spo.data.rows import Completer, DataError, Row, RowError, Split, Text
from spo.data.source import Source

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that only the chat template reads, so that rows of text do not use them."""
COLUMNS = ("prompt", "chosen", "rejected", "preference", "weight", *TEMPLATE_COLUMNS)
"""Columns that a table of pairs may have."""
PROMPT_LIKE_COLUMNS = ("question", "query", "instruction", "input", "conversation", "conversations", "dialogue")
"""Columns that other tools use for the prompt."""
NOTED_COLUMNS = ("system", "system_prompt", *PROMPT_LIKE_COLUMNS, "history", "context", "documents", "image", "images")
"""Columns that other tools put in front of the model. A note states that they are not read."""


class NoPreference(RowError):
    """A well-formed row without a preference: a completion is empty, or chosen equals rejected.

    Published data sets contain a few such rows. They never stop a run: they are skipped, counted and listed.
    """


class TableSource(Source):
    """A source of records with the columns ``chosen`` and ``rejected``.

    The columns ``prompt``, ``preference`` and ``weight`` are optional. Conversations may have ``tools`` and
    ``chat_template_kwargs``. A column that the loss declares is read too. Other columns are ignored, those in
    :data:`NOTED_COLUMNS` with a note. ``rejected`` is optional for a loss that does not read it.

    Args:
        on_bad_row: Policy for a malformed row: ``stop`` raises its error; ``skip`` skips, counts and lists the row.
        columns: Mapping from names in :attr:`read_columns` to the data's own column names, where these differ.

    Attributes:
        known: Names of the columns that this source reads for every loss.
        counts: Number of rows that the last call of :meth:`rows` ``read`` and ``skipped``.
        ignored: Number of rows with a value in a column that is not read, by column of :data:`NOTED_COLUMNS`.
    """

    known: ClassVar[tuple[str, ...]] = COLUMNS
    has_columns = True

    def __init__(self, on_bad_row: OnBadRow, columns: Mapping[str, str] | None) -> None:
        if on_bad_row not in ("stop", "skip"):
            raise DataError(f"data.on_bad_row={on_bad_row}: choose stop or skip")
        super().__init__()
        self.on_bad_row = on_bad_row
        self.columns = dict(columns or {})
        self.counts: dict[str, int] = {"read": 0, "skipped": 0}
        self.ignored: Counter[str] = Counter()
        self._has_prompts = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the name of the data for messages."""

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """Return the names of the columns with numbers that the loss declares for this kind of data."""
        return self.needs.number_columns

    @property
    def read_columns(self) -> tuple[str, ...]:
        """Return the names of all columns that are read, those that the loss declares included."""
        return tuple(dict.fromkeys((*self.known, *self.feature_columns, *self.needs.text_columns)))

    @property
    def number_columns(self) -> frozenset[str]:
        """Return the data's names of the columns with numbers."""
        return frozenset(map(self.column_name, ("preference", "weight", "label", *self.feature_columns)))

    def column_name(self, name: str) -> str:
        """Return the data's own name of a column."""
        return self.columns.get(name, name)

    def check_columns(self) -> None:
        """Check the names in ``data.source.columns``, see :meth:`spo.data.source.Source.check_columns`."""
        if unknown := set(self.columns) - set(self.read_columns):
            raise DataError(
                f"data.source.columns: unknown {sorted(unknown)}; choose from {', '.join(self.read_columns)}"
            )

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
            DataError: If the data is missing, if no row can be used, or if ``data.source.columns`` has an unknown name.
        """
        self.check_columns()
        rows: list[Row] = []
        self.bad_rows = []
        self.findings.clear()
        self.ignored.clear()
        self._has_prompts = False
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
        rows = self._remove_repeated_texts(rows)
        self.counts = {"read": read, "skipped": len(self.bad_rows)}
        if not rows:
            first = f"; the first problem: {self.bad_rows[0]}" if self.bad_rows else ""
            raise DataError(f"{self.name}: none of its {read} rows can be used{first}")
        if not self._has_prompts:
            self.findings.remove("implied_prompts")
        if self.ignored:
            columns = ", ".join(f"{column} ({count} rows)" for column, count in self.ignored.items())
            self.findings.add("ignored_columns", columns, max(self.ignored.values()))
        _find_repeats(rows, self.findings)
        return rows

    def _remove_repeated_texts(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows without repeated text prompts; a row that then has an empty completion is skipped."""
        kept: list[Row] = []
        for row in remove_repeated_texts(rows, self.findings):
            further = [row.columns[name] for name in self.needs.text_columns]
            if any(map(is_empty, [*row.completions, *further])):
                self.bad_rows.append(NoPreference(row.where, "a completion only repeats the prompt"))
            else:
                kept.append(row)
        return kept

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
        candidates = [self._candidate(record, name, where) for name in self._completions(record)]
        if len({isinstance(candidate.text, str) for candidate in candidates}) > 1:
            reason = "one of chosen and rejected is text, the other a list of messages"
            raise RowError(where, reason, candidates[-1].column)
        column = self.column_name("prompt")
        self._has_prompts |= column in record
        # A column that the user mapped must exist; an unmapped prompt may be absent, null or an empty list.
        implied = "prompt" not in self.columns and record.get(column) in (None, [])
        if implied:
            prompt, completions = self.split_prompt(candidates[0], (*candidates, None)[1], where)
            self._check_implied_prompt(record, prompt, where)
        else:
            given = self._text(record, "prompt", where)
            prompt, completions = separate_prompt(given, candidates, column, where, self.findings)
        self._count_turns(prompt, completions, where)
        for candidate, completion in zip(candidates, completions, strict=True):
            if is_empty(completion):
                raise NoPreference(where, "the completion is empty", candidate.column)
        better, worse = completions[0], (*completions, None)[1]
        if better == worse:
            raise NoPreference(where, "chosen and rejected are equal", candidates[-1].column)
        preference = self._number(record, "preference", where, 1.0)
        weight = self._number(record, "weight", where, math.inf)
        columns = self._declared_columns(record, prompt, where, implied)
        values = self._template_values(record, prompt, where)
        return Row(prompt, better, worse, preference, weight, split, where, columns=columns, **values)

    def _completions(self, record: Record) -> Sequence[str]:
        """Return the names of the columns with the completions of a record."""
        column = self.column_name("rejected")
        # A column that the user mapped must exist.
        absent = record.get(column) is None and ("rejected" not in self.columns or column in record)
        return ("chosen",) if absent and not needs_pairs(self.needs) else ("chosen", "rejected")

    def split_prompt(self, chosen: Candidate, rejected: Candidate | None, where: str) -> tuple[Text, list[Text]]:
        """Split whole texts or conversations into the shared prompt and the completions.

        Args:
            chosen: Prompt and better completion.
            rejected: Prompt and worse completion in the same form, ``None`` if there is only one completion.
            where: Place of the record for messages.

        Returns:
            Prompt, and the completions, the better one first.

        Raises:
            RowError: If the shared beginning of two conversations is not followed by messages of the assistant, or if
                nothing shows where the prompt of a single text ends.
        """
        if not isinstance(chosen.text, str):
            return split_conversations([chosen] if rejected is None else [chosen, rejected], where)
        if rejected is None:
            reason = "missing; a row without a rejected completion needs a prompt, since there is nothing to find it by"
            raise RowError(where, reason, self.column_name("prompt"))
        cut = shared_prompt_length(chosen.text, str(rejected.text))
        return chosen.text[:cut], [chosen.text[cut:], rejected.text[cut:]]

    def _declared_columns(self, record: Record, prompt: Text, where: str, implied: bool = False) -> dict[str, Any]:
        """Return the values of the columns that the loss declares: numbers as they are, and further completions.

        Args:
            record: Values by column name.
            prompt: Prompt of the row.
            where: Place of the record for messages.
            implied: Whether the completions of the record are whole texts, which begin with the prompt.
        """
        values: dict[str, Any] = {}
        for name in self.feature_columns:
            # A column that the user mapped must exist; without an unmapped one, the loss may have a default.
            mapped = name in self.columns
            values[name] = self._required(record, name, where)[1] if mapped else record.get(name)
        for name in self.needs.text_columns:
            candidate = self._candidate(record, name, where)
            values[name] = follow_prompt(prompt, candidate, where, implied)
            if is_empty(values[name]):
                raise candidate.error(where, "the completion is empty")
        return values

    def _check_implied_prompt(self, record: Record, prompt: Text, where: str) -> None:
        """Count a row without a prompt, and reject it if another column holds the prompt."""
        self.findings.add("implied_prompts", where)
        values = {name: record[name] for name in PROMPT_LIKE_COLUMNS if record.get(name)}
        missing = {name for name, value in values.items() if not (isinstance(value, str) and value.strip() in prompt)}
        # Text of one such column in the shared beginning shows that chosen and rejected contain the prompt.
        if values and missing == values.keys() and (not prompt or isinstance(prompt, str)):
            column, [name, *_] = self.column_name("prompt"), values
            reason = (
                f"there is no prompt, and chosen and rejected do not begin with {name!r}; set "
                f"data.source.columns={{prompt: {name}}}, or rename the column to prompt"
            )
            raise RowError(where, reason, column)

    def _count_turns(self, prompt: Text, completions: Sequence[Text], where: str) -> None:
        """Count a row whose prompt does not ask anything, or whose completions contain turns of others."""
        if is_empty(prompt) or (not isinstance(prompt, str) and all(turn["role"] != "user" for turn in prompt)):
            self.findings.add("empty_prompts", where)
        turns = [turn for completion in completions if not isinstance(completion, str) for turn in completion]
        if any(turn["role"] != "assistant" for turn in turns):
            self.findings.add("other_turns", where)

    def _template_values(self, record: Record, prompt: Text, where: str) -> dict[str, Any]:
        """Return the fields of a row that the chat template reads, and count the columns that nothing reads."""
        used = {*map(self.column_name, self.read_columns)}
        ignored = [column for column in NOTED_COLUMNS if column not in used]
        tools, kwargs = map(self.column_name, TEMPLATE_COLUMNS)
        values: dict[str, Any] = {}
        if isinstance(prompt, str):
            ignored += [tools, kwargs]
        else:
            values["tools"] = tool_list(record.get(tools), where, tools)
            values["template_kwargs"] = template_kwargs(record.get(kwargs), where, kwargs)
        self.ignored.update(column for column in ignored if record.get(column))
        return values

    def _text(self, record: Record, name: str, where: str) -> Text:
        column, value = self._required(record, name, where)
        return text_or_messages(value, where, column)

    def _candidate(self, record: Record, name: str, where: str) -> Candidate:
        return Candidate(self._text(record, name, where), self.column_name(name))

    def _required(self, record: Record, name: str, where: str) -> tuple[str, Any]:
        """Return the data's name of a column, and its value in a record that must have it."""
        column = self.column_name(name)
        if column not in record:
            names = ", ".join(map(str, record)) or "no columns"
            raise RowError(where, f"missing; the row has {names} (data.source.columns maps other names)", column)
        return column, record[column]

    def _number(self, record: Record, name: str, where: str, highest: float) -> float | None:
        column = self.column_name(name)
        if record.get(column) is None:
            if name in self.columns and column not in record:
                raise RowError(where, f"missing; the row has {', '.join(map(str, record))}", column)
            return None
        return number_cell(record[column], where, column, 0.0, highest)


def _find_repeats(rows: Sequence[Row], findings: Findings) -> None:
    """Count rows that repeat another row, and completions that rows of a prompt rank or label both ways."""
    by_prompt: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_prompt[prompt_id(row.prompt, row.tools, row.template_kwargs)].append(row)
    for group in by_prompt.values():
        if len(group) == 1:
            continue
        seen: set[tuple[Any, ...]] = set()
        ranked: set[tuple[str, ...]] = set()
        labelled: dict[str, bool] = {}
        for row in group:
            ranking = [prompt_id(text) for text in row.completions]
            key = (*ranking, row.preference, row.weight, row.label)
            if key in seen:
                findings.add("repeated_rows", row.where)
                continue
            seen.add(key)
            if row.label not in (None, 0.5) and labelled.setdefault(ranking[0], row.label > 0.5) != (row.label > 0.5):
                findings.add("contradicting_labels", row.where)
            if row.preference == 0.5:
                continue
            if row.preference is not None and row.preference < 0.5:
                ranking.reverse()
            for pair in combinations(ranking, 2):
                if pair not in ranked and pair[::-1] in ranked:
                    findings.add("contradicting_pairs", row.where)
                ranked.add(pair)
