"""The jobs of a sweep as its ledger ``sweep.json`` lists them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from spo.errors import UserError
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


def parse_jobs(ledger: Any) -> list[SweepJob] | None:
    """Return the jobs in the content of ``sweep.json``, ``None`` where it is not the content of a ledger."""
    entries = ledger.get("jobs", []) if isinstance(ledger, dict) else None
    if not isinstance(entries, list) or not all(map(_is_job, entries)):
        return None
    names = {field.name for field in fields(SweepJob)}
    return [SweepJob(**{key: value for key, value in job.items() if key in names}) for job in entries]


def _is_job(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("overrides"), list)
        and all(isinstance(text, str) for text in entry["overrides"])
        and isinstance(entry.get("directory"), str)
        and entry.get("status", "unfinished") in get_args(JobStatus)
        and all(isinstance(entry.get(key), str | None) for key in ("same_as", "error"))
    )


def read_jobs(sweep_dir: Path) -> list[SweepJob]:
    """Return the jobs of a sweep in the order in which they were entered; none if there is no ledger.

    Raises:
        UserError: The ledger is damaged.
    """
    file = sweep_dir / filenames.SWEEP
    jobs = parse_jobs(read_json(file)) if file.exists() else []
    if jobs is None:
        raise UserError(
            f"{file} is damaged, so jobs that did not leave a run are unknown: run the command of the sweep again, "
            "which writes the file anew, or move it away"
        )
    return jobs
