"""The ledger of a sweep: ``sweep.json``, to which all processes of the sweep write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from spo.errors import SET_SWEEP, placed_by
from spo.records import filenames
from spo.records.files import move_aside, read_json, write_json
from spo.records.sweep import JobStatus, SweepJob, parse_jobs, read_jobs
from spo.runs.claim import is_finished, is_locked, read_failure, write_failure
from spo.secrets import without_secrets

DIED_MESSAGE = "its process died: it was killed, perhaps because memory ran out"


class Ledger:
    """``sweep.json`` in the directory of a sweep.

    Args:
        directory: Sweep directory, created where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        with placed_by(SET_SWEEP, self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    def begin(self, command: str, jobs: Sequence[tuple[list[str], str]], rerun: bool = False) -> list[SweepJob]:
        """Enter the jobs of a command, with the states that their directories show, and return them.

        Jobs of earlier commands stay in the ledger as long as their directories exist.

        Args:
            command: Command as it was typed.
            jobs: Overrides and directory name of each job.
            rerun: Whether the jobs will move existing runs aside.
        """
        entries: list[SweepJob] = []
        for overrides, name in jobs:
            same = any(entry.directory == name for entry in entries)
            entry = SweepJob(overrides, name, same_as=name if same else None)
            if not rerun:
                _read_status(entry, self.directory / name)
            entries.append(entry)
        with self._open() as ledger:
            ours = {entry.directory for entry in entries}
            others = [entry for entry in ledger["jobs"] if entry.directory not in ours]
            earlier = [entry for entry in others if (self.directory / entry.directory).is_dir()]
            ledger["command"], ledger["jobs"] = command, [*earlier, *entries]
        return entries

    def note(self, overrides: Sequence[str], directory: str, status: JobStatus, error: str | None = None) -> None:
        """Enter the state of a job."""
        with self._open() as ledger:
            found = _find(ledger["jobs"], overrides)
            if found is None:
                found = SweepJob(list(overrides), directory)
                ledger["jobs"].append(found)
            found.directory, found.status, found.error = directory, status, error

    def entry(self, overrides: Sequence[str]) -> SweepJob | None:
        """Return the entry of a job, ``None`` where it has none."""
        return _find(self.entries(), overrides)

    def entries(self) -> list[SweepJob]:
        """Return all jobs in the order in which they were entered."""
        return read_jobs(self.directory)

    def begun(self, jobs: Sequence[SweepJob]) -> list[str]:
        """Return the directories of the ``jobs`` that have begun and not ended."""
        ours = {entry.directory for entry in jobs}
        return [e.directory for e in self.entries() if e.directory in ours and e.status == "running"]

    def abandoned(self, jobs: Sequence[SweepJob]) -> list[SweepJob]:
        """Return the ``jobs`` that have begun and not ended, and that no process works on."""
        begun = self.begun(jobs)
        lost = [name for name in begun if not is_locked(self.directory / name)]
        return [entry for entry in self.entries() if entry.directory in lost and entry.status == "running"]

    def settle(self, jobs: Sequence[SweepJob], died: bool = False) -> list[SweepJob]:
        """Enter the final states of ``jobs`` when their command ends.

        Args:
            jobs: Jobs of the command.
            died: Whether jobs that have begun and not ended count as failed instead of unfinished.

        Returns:
            The jobs with their final states.
        """
        for entry in self.abandoned(jobs):
            if died:
                write_failure(self.directory / entry.directory, DIED_MESSAGE)
            self.note(entry.overrides, entry.directory, *(("failed", DIED_MESSAGE) if died else ("unfinished",)))
        with self._open() as ledger:
            # Jobs that are the same run did not start; they end as the one that did.
            first = {entry.directory: entry for entry in ledger["jobs"] if entry.same_as is None}
            for entry in ledger["jobs"]:
                if entry.same_as in first:
                    entry.status, entry.error = first[entry.same_as].status, first[entry.same_as].error
        return [found for entry in jobs if (found := self.entry(entry.overrides)) is not None]

    @contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        with placed_by(SET_SWEEP, self.directory), FileLock(self.directory / filenames.SWEEP_LOCK):
            file = self.directory / filenames.SWEEP
            found: dict[str, Any] = read_json(file) if file.exists() else {"command": ""}
            jobs = parse_jobs(found)
            if jobs is None:  # The command enters its jobs again, with the states that their directories show.
                move_aside(file)
                found, jobs = {"command": ""}, []
            found["jobs"] = jobs
            yield found
            write_json(file, {**found, "jobs": [asdict(entry) for entry in found["jobs"]]})


def _find(entries: Sequence[SweepJob], overrides: Sequence[str]) -> SweepJob | None:
    wanted = without_secrets(overrides)  # The file does not hold secrets.
    return next((entry for entry in entries if without_secrets(entry.overrides) == wanted), None)


def _read_status(entry: SweepJob, directory: Path) -> None:
    if is_finished(directory):
        entry.status = "finished"
    elif failure := read_failure(directory):
        entry.status, entry.error = "failed", str(failure.get("error", "no reason was recorded"))
