"""The part of trackers that callbacks call while the policy trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer


@runtime_checkable
class LiveTracker(Protocol):
    """A logger that shows more than curves while the policy trains. Only the first process calls it."""

    def alert(self, title: str, text: str, step: int) -> None:
        """Send a message to the person who runs this.

        A resumed run repeats its earlier messages.
        """

    def show_validation_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the samples of all validations so far, rows of ``samples.jsonl`` with their ``step``."""


def live_trackers(trainer: Trainer) -> list[LiveTracker]:
    """Return the loggers of a run that are live trackers."""
    return [logger for logger in trainer.loggers if isinstance(logger, LiveTracker)]
