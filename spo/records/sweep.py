"""The jobs of a sweep as its ledger ``sweep.json`` lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spo.records import filenames
from spo.records.files import read_json

JobStatus = Literal["finished", "failed", "running", "unfinished"]


@dataclass
class SweepJob:
    """A job of a sweep.

    Attributes:
        overrides: Overrides of the job, without Hydra's own.
        directory: Name of the job's run directory inside the sweep directory.
        status: State of the job.
        same_as: Directory of an earlier job that is the same run; this job is not started.
        error: Reason for a failure.
    """

    overrides: list[str]
    directory: str
    status: JobStatus = "unfinished"
    same_as: str | None = None
    error: str | None = None


def parse_jobs(ledger: Mapping[str, Any] | None) -> list[SweepJob]:
    """Return the jobs in the content of ``sweep.json``."""
    return [SweepJob(**job) for job in (ledger or {}).get("jobs", [])]


def read_jobs(sweep_dir: Path) -> list[SweepJob]:
    """Return the jobs of a sweep in the order in which they were entered; none if there is no ledger."""
    return parse_jobs(read_json(sweep_dir / filenames.SWEEP))
