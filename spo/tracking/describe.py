"""The description of a run that every tracker receives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class RunDescription:
    """A run as dashboards list it.

    Attributes:
        name: Method, the coefficients that it uses, and seed.
        group: Name of the sweep or of the iteration; ``None`` for a single run.
        job_type: Kind of work; the method.
        tags: Tags to filter by.
        config: Resolved configuration and provenance, without secrets.
        directory: Run directory, where a tracker may store the id of its own run.
        recorded: Rows of ``history.jsonl`` from before an interruption; a tracker may have seen only some of them.
        first_step: Step at which dashboards show step 0 of this run, so that a round continues the one before it.
    """

    name: str
    group: str | None
    job_type: str
    tags: list[str]
    config: dict[str, Any]
    directory: Path
    recorded: Sequence[Mapping[str, Any]] = ()
    first_step: int = 0

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Return ``provenance.json`` of the run."""
        return self.config.get("provenance") or {}


@runtime_checkable
class Tracker(Protocol):
    """A logger that shows more than curves. :class:`spo.callbacks.trackers.LiveTracker` has optional methods."""

    def describe(self, description: RunDescription) -> None:
        """Open the run, before its first metric."""

    def conclude(self, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Show the final metrics and the samples."""

    def close(self) -> None:
        """Close the run, however it ended."""
