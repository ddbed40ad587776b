"""What evaluation asks of a judge, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rich import get_console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn


@dataclass(frozen=True)
class JudgedPair:
    """Two completions of one prompt, of which one may be the better."""

    prompt: str
    first: str
    second: str

    @property
    def swapped(self) -> JudgedPair:
        """The same, shown the other way round."""
        return JudgedPair(self.prompt, self.second, self.first)


@runtime_checkable
class Judge(Protocol):
    """Compares completions; one that scores them by themselves says the scores too."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-like; whatever its verdicts follow from. A judge with another identity is another judge."""

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]] | None:
        """Scores by name, ``reward`` and its components, one number per completion; ``None`` if it only compares."""

    def verdicts(self, comparisons: Sequence[JudgedPair]) -> list[float | None]:
        """1 where the first completion is better, 0 where the second is, 0.5 for a tie; ``None`` for no answer.

        Swapping the two completions of a comparison turns a verdict ``v`` into ``1 - v``.
        """

    def usage(self) -> dict[str, float]:
        """What was spent since it was made, such as ``calls``, ``cached``, ``tokens``; empty where nothing is."""


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar in the terminal, if there is one; what it yields is called with the number of things just done."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not get_console().is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
