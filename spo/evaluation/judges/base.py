"""Interface of all judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rich import get_console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn


@dataclass(frozen=True)
class JudgedPair:
    """Two completions of one prompt, to be compared."""

    prompt: str
    first: str
    second: str

    @property
    def swapped(self) -> JudgedPair:
        """Return the pair in the other order."""
        return JudgedPair(self.prompt, self.second, self.first)


@runtime_checkable
class Judge(Protocol):
    """Judge of completions. Some judges only compare, others score each completion too."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return all that the verdicts depend on, as JSON values. Cached verdicts belong to an identity."""

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]] | None:
        """Return one number per completion for ``reward`` and each component; ``None`` if the judge only compares."""

    def verdicts(self, comparisons: Sequence[JudgedPair]) -> list[float | None]:
        """Return 1 if the first completion is better, 0 if the second is, 0.5 for a tie, ``None`` for no answer.

        Swapping the two completions of a comparison turns a verdict ``v`` into ``1 - v``.
        """

    def usage(self) -> dict[str, float]:
        """Return what the judge has spent, such as ``calls``, ``cached``, ``tokens``; empty if it does not count."""


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar if there is a terminal, and yield a function that advances it by a number of items."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not get_console().is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
