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
from spo.data.cells import describe_type, template_kwargs, tool_list
from spo.data.findings import Findings
from spo.data.messages import is_empty, text_or_messages
from spo.data.prompts import (
    Candidate,
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
    ``chat_template_kwargs``. Other columns are ignored, those in :data:`NOTED_COLUMNS` with a note.

    Args:
        on_bad_row: Policy for a malformed row: ``stop`` raises its error; ``skip`` skips, counts and lists the row.
        columns: Mapping from names in :attr:`known` to the data's own column names, where these differ.

    Attributes:
        known: Names of the columns that this source reads.
        counts: Number of rows that the last call of :meth:`rows` ``read`` and ``skipped``.
        ignored: Number of rows with a value in a column that is not read, by column of :data:`NOTED_COLUMNS`.
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
        self.ignored: Counter[str] = Counter()
        self._has_prompts = False

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
            if any(map(is_empty, row.completions)):
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
        chosen, rejected = (self._candidate(record, name, where) for name in ("chosen", "rejected"))
        if isinstance(chosen.text, str) != isinstance(rejected.text, str):
            raise RowError(where, "one of chosen and rejected is text, the other a list of messages", rejected.column)
        column = self.columns.get("prompt", "prompt")
        self._has_prompts |= column in record
        # A column that the user mapped must exist; an unmapped prompt may be absent, null or an empty list.
        if "prompt" not in self.columns and record.get(column) in (None, []):
            prompt, *completions = self.split_prompt(chosen, rejected, where)
            self._check_implied_prompt(record, prompt, where)
        else:
            given = self._text(record, "prompt", where)
            prompt, completions = separate_prompt(given, [chosen, rejected], column, where, self.findings)
        self._count_turns(prompt, completions, where)
        better, worse = completions
        for candidate, completion in ((chosen, better), (rejected, worse)):
            if is_empty(completion):
                raise NoPreference(where, "the completion is empty", candidate.column)
        if better == worse:
            raise NoPreference(where, "chosen and rejected are equal", rejected.column)
        preference = self._number(record, "preference", where, 1.0)
        weight = self._number(record, "weight", where, math.inf)
        values = self._template_values(record, prompt, where)
        return Row(prompt, better, worse, preference, weight, split, where, **values)

    def split_prompt(self, chosen: Candidate, rejected: Candidate, where: str) -> tuple[Text, Text, Text]:
        """Split two whole texts or conversations into the shared prompt and the two completions.

        Args:
            chosen: Prompt and better completion.
            rejected: Prompt and worse completion, in the same form.
            where: Place of the record for messages.

        Returns:
            Prompt, better completion and worse completion.

        Raises:
            RowError: If the shared beginning of two conversations is not followed by messages of the assistant.
        """
        if isinstance(chosen.text, str):
            cut = shared_prompt_length(chosen.text, str(rejected.text))
            return chosen.text[:cut], chosen.text[cut:], rejected.text[cut:]
        prompt, completions = split_conversations([chosen, rejected], where)
        return prompt, completions[0], completions[1]

    def _check_implied_prompt(self, record: Record, prompt: Text, where: str) -> None:
        """Count a row without a prompt, and reject it if another column holds the prompt."""
        self.findings.add("implied_prompts", where)
        values = {name: record[name] for name in PROMPT_LIKE_COLUMNS if record.get(name)}
        missing = {name for name, value in values.items() if not (isinstance(value, str) and value.strip() in prompt)}
        # Text of one such column in the shared beginning shows that chosen and rejected contain the prompt.
        if values and missing == values.keys() and (not prompt or isinstance(prompt, str)):
            column, [name, *_] = self.columns.get("prompt", "prompt"), values
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
        used = {self.columns.get(name, name) for name in self.known}
        ignored = [column for column in NOTED_COLUMNS if column not in used]
        tools, kwargs = (self.columns.get(name, name) for name in TEMPLATE_COLUMNS)
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
        return Candidate(self._text(record, name, where), self.columns.get(name, name))

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


def _find_repeats(rows: Sequence[Row], findings: Findings) -> None:
    """Count rows that repeat another row, and pairs of completions that rows of a prompt rank both ways."""
    by_prompt: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_prompt[prompt_id(row.prompt, row.tools, row.template_kwargs)].append(row)
    for group in by_prompt.values():
        if len(group) == 1:
            continue
        seen: set[tuple[Any, ...]] = set()
        ranked: set[tuple[str, ...]] = set()
        for row in group:
            ranking = [prompt_id(text) for text in row.completions]
            key = (*ranking, row.preference, row.weight)
            if key in seen:
                findings.add("repeated_rows", row.where)
                continue
            seen.add(key)
            if row.preference == 0.5:
                continue
            if row.preference is not None and row.preference < 0.5:
                ranking.reverse()
            for pair in combinations(ranking, 2):
                if pair not in ranked and pair[::-1] in ranked:
                    findings.add("contradicting_pairs", row.where)
                ranked.add(pair)
