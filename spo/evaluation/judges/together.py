"""Judging on all processes of a run: the first one judges, and the others run the model of the judge for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from spo.batching import chunks
from spo.evaluation.judges.base import Judge
from spo.processes import deal, gather, rank, share, world_size


class Forwards:
    """Forward passes of a judge, which several processes may share.

    Args:
        compute: Function from a batch, which can be pickled, to a number of each of its rows.
    """

    def __init__(self, compute: Callable[[Any], list[float]]) -> None:
        self.compute = compute
        self.is_shared = False

    def of(self, batches: Sequence[Any]) -> Iterator[list[float]]:
        """Yield the numbers of each batch in order.

        Args:
            batches: Batches of the judge.
        """
        if not self.is_shared:
            yield from map(self.compute, batches)
            return
        for some in chunks(batches, world_size()):
            share(some)
            yield from self._together(some)

    @contextmanager
    def shared(self) -> Iterator[bool]:
        """Make a context in which the first process judges, and yield whether this process is the first.

        All processes of the run enter it. The others stay at the beginning, and compute what the first one shares.
        """
        if world_size() == 1:
            yield True
        elif rank() > 0:
            while (some := share(None)) is not None:
                self._together(some)
            yield False
        else:
            self.is_shared = True
            yield True
            # After an error this process ends, which the others notice. They might be waiting for a batch's numbers.
            self.is_shared = False
            share(None)

    def _together(self, batches: Sequence[Any]) -> list[list[float]]:
        return gather([self.compute(batch) for batch in deal(batches)])


@contextmanager
def judging(judge: Judge | None) -> Iterator[bool]:
    """Make a context in which the first process judges, and yield whether this process is the first.

    Args:
        judge: Judge of this process. One with the attribute ``forwards`` runs its model on all processes.
    """
    forwards = getattr(judge, "forwards", None)
    if isinstance(forwards, Forwards):
        with forwards.shared() as is_first:
            yield is_first
    else:
        yield rank() == 0
