"""What a tracker is told about a run, whichever tracker it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class RunDescription:
    """A run as dashboards list it.

    Attributes:
        name: method and the coefficients it reads, with the seed.
        group: runs that belong together: the sweep; single runs share the name of the folder they are in.
        job_type: what kind of work it is.
        tags: for filtering.
        config: the resolved configuration and provenance, free of secrets.
        directory: the run directory, where a tracker may keep which run of its own this is.
        recorded: rows of ``history.jsonl`` from before an interruption, which a view may have lost or seen in part.
    """

    name: str
    group: str
    job_type: str
    tags: list[str]
    config: dict[str, Any]
    directory: Path
    recorded: Sequence[Mapping[str, Any]] = ()


@runtime_checkable
class Tracker(Protocol):
    """A logger that shows more than curves."""

    def describe(self, description: RunDescription) -> None:
        """Opens the run, before its first metric."""

    def conclude(self, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Takes the final numbers and the samples."""

    def close(self) -> None:
        """Closes the run, however it ended."""
