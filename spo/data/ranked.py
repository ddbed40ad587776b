"""Ranked lists of responses from files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any

from annotated_types import Ge

from spo.bounds import OnBadRow
from spo.data.cells import describe_type
from spo.data.files import FileSource
from spo.data.messages import is_empty, text_or_messages
from spo.data.needs import numbers_of
from spo.data.prompts import Candidate, separate_prompt
from spo.data.readers import Record
from spo.data.rendering import prompt_id
from spo.data.rows import Completer, DataError, Row, RowError, Split, Text
from spo.data.tables import TEMPLATE_COLUMNS, NoPreference


class RankedFileSource(FileSource):
    """Rows of ``prompt`` and ranked ``responses`` in a jsonl, jsonl.gz or parquet file, or a folder of such files.

    Prompt and responses are text, or lists of messages. The ranking is ``order``: positions in ``responses``, counted
    from 0, the best first. A row without ``order`` has ``scores``: one number per response, higher is better.
    ``weight`` (>= 0) is optional. So are ``tools`` and ``chat_template_kwargs`` of conversations. Where the loss reads
    a number of each completion, the column ``NAMEs`` lists one per response.

    Three kinds of responses are dropped from a list and counted in ``dropped_responses``: empty ones, those equal to a
    better one, and all but one of those with equal scores. The digest of the text decides which of these stays, so
    that the order in the file is not taken for a preference. A row with fewer than two responses left is skipped,
    counted and listed.

    Args:
        path: Path of the file or folder.
        columns: Mapping from our column names to the file's, see :class:`~spo.data.tables.TableSource`.
        on_bad_row: Policy for a malformed row, ``stop`` or ``skip``.
        max_responses: Largest number of responses in a list; ``None`` for no limit. The digests of the texts decide
            which ones stay. Their ranks must not: the best few of a ranking do not follow the Plackett-Luce model.
    """

    known = ("prompt", "responses", "scores", "order", "weight", *TEMPLATE_COLUMNS)

    def __init__(
        self,
        path: str,
        columns: Mapping[str, str] | None,
        on_bad_row: OnBadRow,
        max_responses: Annotated[int, Ge(2)] | None,
    ) -> None:
        super().__init__(path, columns, on_bad_row)
        if max_responses is not None and max_responses < 2:
            raise DataError(f"data.source.max_responses={max_responses}: a ranking needs at least 2")
        self.max_responses = max_responses
        self.yields_lists = max_responses is None or max_responses > 2

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """Return the names of the columns with numbers that the loss declares, with a list for each feature."""
        return self.needs.list_number_columns

    def rows(self, complete: Completer) -> list[Row]:
        """Return the usable rows, see :meth:`spo.data.tables.TableSource.rows`."""
        self.dropped_responses.clear()
        return super().rows(complete)

    def parse(self, record: Record, where: str, split: Split | None) -> Row:
        """Convert a record to a row.

        Args:
            record: Values by column name.
            where: Place of the record for messages, such as file and line.
            split: Split that the source assigns to the record, or ``None``.

        Raises:
            RowError: If the record is malformed, with the column and the reason.
            NoPreference: If fewer than two responses are left.
        """
        prompt, column = self._text(record, "prompt", where), self.columns.get("responses", "responses")
        items = self._list(record, "responses", where)
        if len(items) < 2:
            raise RowError(where, f"a ranking needs at least 2 responses, not {len(items)}", column)
        names = [f"response {i}" for i in range(1, len(items) + 1)]
        candidates = [Candidate(text_or_messages(item, where, column, name), column, name)
                      for item, name in zip(items, names, strict=True)]  # fmt: skip
        if len({isinstance(candidate.text, str) for candidate in candidates}) > 1:
            raise RowError(where, "responses must all be text, or all lists of messages", column)
        prompt, responses = separate_prompt(
            prompt, candidates, self.columns.get("prompt", "prompt"), where, self.findings
        )
        self._count_turns(prompt, responses, where)
        kept, dropped = self._drop_uninformative(responses, self._ranks(record, responses, where))
        if len(kept) < 2:
            raise NoPreference(where, "fewer than 2 responses are left without empty, equal and tied ones", column)
        # Digests are as good as random, but the same in every run and for every order of the file.
        selected = sorted(kept)[: self.max_responses]
        places = [place for digest, place in kept.items() if digest in selected]
        chosen, rejected, *worse = (responses[place] for place in places)
        weight = self._number(record, "weight", where, math.inf)
        self.dropped_responses += dropped
        values = self._template_values(record, prompt, where)
        values["columns"] = self._arranged_columns(record, prompt, where, len(items), places)
        return Row(prompt, chosen, rejected, weight=weight, split=split, where=where, worse=tuple(worse), **values)

    def _arranged_columns(
        self, record: Record, prompt: Text, where: str, size: int, places: Sequence[int]
    ) -> dict[str, Any]:
        """Return the values of the columns that the loss declares; numbers of responses are sorted as these are.

        Args:
            record: Values by column name.
            prompt: Prompt of the row.
            where: Place of the record for messages.
            size: Number of responses of the record.
            places: Positions of the responses that stay, best first.
        """
        values = self._declared_columns(record, prompt, where)
        for name in {one.list_columns[0] for one in self.needs.features.values() if one.each}:
            if values[name] is not None:
                numbers = numbers_of(values[name], size, where, self.column_name(name), f" for {size} responses")
                values[name] = tuple(numbers[place] for place in places)
        return values

    def _ranks(self, record: Record, responses: Sequence[Text], where: str) -> list[list[int]]:
        """Return positions in ``responses``, best first, one list for each rank."""
        size = len(responses)
        if "order" in self.columns or record.get("order") is not None:
            order, column = self._list(record, "order", where), self.columns.get("order", "order")
            if any(isinstance(i, bool) or not isinstance(i, int) for i in order) or sorted(order) != list(range(size)):
                raise RowError(where, f"must contain each of 0 to {size - 1} once, the best response first", column)
            return [[i] for i in order]
        scores, column = self._list(record, "scores", where), self.columns.get("scores", "scores")
        if len(scores) != size:
            raise RowError(where, f"has {len(scores)} numbers for {size} responses", column)
        for i, score in enumerate(scores, 1):
            if isinstance(score, bool) or not isinstance(score, (int, float)):
                raise RowError(where, f"score {i} must be a number, not {describe_type(score)}", column)
            if not math.isfinite(score):
                raise RowError(where, f"score {i} must be finite, not {score}", column)
        best_first = sorted(range(size), key=lambda i: -scores[i])
        return [list(tied) for _, tied in groupby(best_first, key=scores.__getitem__)]

    def _drop_uninformative(
        self, responses: Sequence[Text], ranks: Sequence[Sequence[int]]
    ) -> tuple[dict[str, int], Counter[str]]:
        """Return the place of a response for each rank, best first, by digest of its text, and count the others."""
        kept: dict[str, int] = {}
        dropped: Counter[str] = Counter()
        for tied in ranks:
            # One response for each rank: a preference between equal scores would be made up.
            rank_is_filled = False
            for digest, place in sorted(((prompt_id(responses[i]), i) for i in tied), key=itemgetter(0)):
                if is_empty(responses[place]):
                    dropped["empty"] += 1
                elif digest in kept:
                    dropped["equal"] += 1
                elif rank_is_filled:
                    dropped["tied"] += 1
                else:
                    kept[digest], rank_is_filled = place, True
        return kept, dropped

    def _list(self, record: Record, name: str, where: str) -> list[Any]:
        column, value = self._required(record, name, where)
        if not isinstance(value, list):
            raise RowError(where, f"must be a list, not {describe_type(value)}", column)
        return value
