"""What a tracker is told about a run, whichever tracker it is."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    name: str
    group: str
    job_type: str
    tags: list[str]
    config: dict[str, Any]


@runtime_checkable
class Tracker(Protocol):
    """A logger that shows more than curves."""

    def describe(self, description: RunDescription) -> None:
        """Says what the run is, before its first metric."""

    def conclude(self, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Takes the final numbers and the samples."""

    def close(self) -> None:
        """Closes the run, however it ended."""
