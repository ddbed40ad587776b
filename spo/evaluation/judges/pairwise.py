"""Judges that compare two completions, asked about both orders, with a store of their verdicts."""

from __future__ import annotations

import json
import re
import sqlite3
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any

from spo.data.rows import Text
from spo.errors import JudgeError
from spo.evaluation.judges.base import JudgedPair, progress
from spo.records.digests import digest
from spo.records.plugins import plugin_digests
from spo.records.store import DamagedRowError, SharedStore

PLACEHOLDERS = ("prompt", "first", "second")


class PairwiseJudge(ABC):
    """Base of judges that compare: the verdict is the mean of the answers about both orders.

    A judge that always prefers the first completion thus gives a tie, and swapping the completions turns a verdict
    ``v`` into exactly ``1 - v``. Equal completions are a tie without a question. A subclass answers in the order that
    it is shown.

    Args:
        cache: File of the verdicts, shared by runs and processes. Each verdict is written at once, so an interrupted
            evaluation resumes with the open questions.
        max_unanswered: Largest share of the questions that may stay without an answer.
    """

    def __init__(self, cache: str | Path, max_unanswered: float) -> None:
        self.max_unanswered = max_unanswered
        self._store = VerdictStore(Path(cache))
        self._spent: Counter[str] = Counter({"calls": 0, "cached": 0, "unanswered": 0})
        self._lock = Lock()

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return JSON-like values that determine the answers."""

    @abstractmethod
    def ask(self, comparisons: Sequence[JudgedPair]) -> Generator[Mapping[JudgedPair, float | str], None, None]:
        """Compare completions in the order shown, and yield the answers as they come.

        Yields:
            Some of the comparisons, each with its verdict (1 first, 0 second, 0.5 tie), or with a sentence that says
            why there is none.
        """

    def scores(self, prompts: Sequence[Text], completions: Sequence[str]) -> None:
        """Return ``None``: the judge compares and does not score."""
        return None

    def verdicts(self, comparisons: Sequence[JudgedPair]) -> list[float | None]:
        """Return a verdict for each comparison, from the store where it has the answers.

        Returns:
            The mean of the two answers about each comparison, ``None`` where one is missing.

        Raises:
            JudgeError: More than ``max_unanswered`` of the questions stay without an answer, or none can be asked.
        """
        code = plugin_digests([type(self).__module__])  # A judge from outside the package has code of its own.
        own = json.dumps(self.identity | ({"plugins": code} if code else {}), sort_keys=True)
        keys = {
            shown: digest([own, shown.prompt, shown.first, shown.second])
            for comparison in comparisons
            if comparison.first != comparison.second
            for shown in (comparison, comparison.swapped)
        }
        known = self._store.get(keys.values())
        verdicts = {shown: known[key] for shown, key in keys.items() if key in known}
        self.spend(cached=len(verdicts))
        open_questions = [shown for shown in keys if shown not in verdicts]
        if open_questions:
            verdicts |= self._ask_and_store(open_questions, keys)
        return [_mean(comparison, verdicts) for comparison in comparisons]

    def usage(self) -> dict[str, float]:
        """Return counts: questions asked (``calls``), answered by the cache, unanswered, and those of a subclass."""
        with self._lock:
            return {key: float(value) for key, value in self._spent.items()}

    def spend(self, **amounts: float) -> None:
        """Add to the counts of :meth:`usage`; any thread may call it."""
        with self._lock:
            self._spent.update(amounts)

    def _ask_and_store(self, questions: list[JudgedPair], keys: Mapping[JudgedPair, str]) -> dict[JudgedPair, float]:
        verdicts: dict[JudgedPair, float] = {}
        missing = 0
        with (
            progress("judging", len(keys), len(keys) - len(questions)) as advance,
            closing(self.ask(questions)) as answers,
        ):
            for some in answers:
                found = {shown: answer for shown, answer in some.items() if not isinstance(answer, str)}
                self._store.put({keys[shown]: verdict for shown, verdict in found.items()})
                verdicts |= found
                advance(len(some))
                self.spend(unanswered=len(some) - len(found))
                missing += len(some) - len(found)
                if missing > self.max_unanswered * len(keys):  # the other questions would cost time and money in vain
                    reason = next(answer for answer in some.values() if isinstance(answer, str))
                    raise JudgeError(
                        f"the judge left more than {self.max_unanswered:.0%} of {len(keys)} questions unanswered "
                        f"(judge.max_unanswered); the last one: {reason}. Solve this and run the same command "
                        f"again: {self._store.file} has the answers so far"
                    )
        return verdicts


def _mean(comparison: JudgedPair, verdicts: Mapping[JudgedPair, float]) -> float | None:
    if comparison.first == comparison.second:
        return 0.5
    there, back = verdicts.get(comparison), verdicts.get(comparison.swapped)
    return None if there is None or back is None else (there + (1 - back)) / 2


class VerdictStore(SharedStore):
    """Verdicts by key. They may have cost money, so a damaged file is an error and is not replaced.

    Args:
        file: SQLite file, created where it is missing.
    """

    schema = "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict REAL NOT NULL)"
    content = "verdicts"
    location_key = "judge.cache"
    error = JudgeError
    recomputable = False

    def get(self, keys: Iterable[str]) -> dict[str, float]:
        """Return the known verdicts by key.

        Raises:
            JudgeError: The file cannot be used.
        """
        if not self.file.exists():
            return {}

        def read(database: sqlite3.Connection) -> dict[str, float]:
            found = ((key, database.execute("SELECT verdict FROM verdicts WHERE key = ?", [key])) for key in keys)
            return {key: _checked(row[0]) for key, cursor in found if (row := cursor.fetchone()) is not None}

        return self.transact(read, reads=True)

    def put(self, verdicts: Mapping[str, float]) -> None:
        """Store verdicts.

        Raises:
            JudgeError: The file cannot be used.
        """
        if verdicts:
            rows = list(verdicts.items())
            self.transact(lambda database: database.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", rows))


def _checked(verdict: object) -> float:
    if not (isinstance(verdict, float | int) and 0 <= verdict <= 1):
        raise DamagedRowError
    return float(verdict)


def check_template(template: str) -> str:
    """Return the template of a question if it contains ``{prompt}``, ``{first}`` and ``{second}``.

    Raises:
        ValueError: One of them is missing.
    """
    if absent := [f"{{{name}}}" for name in PLACEHOLDERS if f"{{{name}}}" not in template]:
        raise ValueError(f"judge.template: {' and '.join(absent)} must occur in it")
    return template


def question(template: str, comparison: JudgedPair) -> str:
    """Return the template with prompt and completions filled in; braces inside of those stay as they are."""
    return re.sub(rf"{{({'|'.join(PLACEHOLDERS)})}}", lambda match: getattr(comparison, match[1]), template)
