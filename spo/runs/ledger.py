"""A sweep: the ledger of its jobs, which all its processes write to, and the table at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spo.runs.rundir import METRICS, is_finished, is_locked, read_failure, read_json, write_failure, write_json

LEDGER, LOCK = "sweep.json", ".sweep.lock"
DIED = "its process died: it was killed, perhaps for want of memory"
Status = Literal["finished", "failed", "running", "unfinished"]
_STYLES: dict[Status, str] = {"finished": "green", "failed": "red", "running": "yellow", "unfinished": "yellow"}


@dataclass
class Entry:
    """One job of a sweep.

    Attributes:
        overrides: of the job, without Hydra's own.
        directory: its name inside the sweep directory.
        status: what became of it.
        same_as: directory of an earlier job that is the same run; the job itself is not started.
        error: why it failed, in words.
    """

    overrides: list[str]
    directory: str
    status: Status = "unfinished"
    same_as: str | None = None
    error: str | None = None


class Ledger:
    """``sweep.json`` in the directory of a sweep.

    Args:
        directory: of the sweep; made where it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def begin(self, command: str, jobs: Sequence[tuple[list[str], str]], rerun: bool = False) -> list[Entry]:
        """Enters the jobs of a command, with what their directories hold of them.

        Jobs that earlier commands have left in the same directory stay in the ledger.

        Args:
            command: as typed.
            jobs: overrides and directory of each.
            rerun: whether what is there will be moved aside.
        """
        entries: list[Entry] = []
        for overrides, name in jobs:
            same = any(entry.directory == name for entry in entries)
            entry = Entry(overrides, name, same_as=name if same else None)
            if not rerun:
                _read_status(entry, self.directory / name)
            entries.append(entry)
        with self._open() as ledger:
            ours = {entry.directory for entry in entries}
            others = [entry for entry in ledger["jobs"] if entry.directory not in ours]
            kept = [entry for entry in others if (self.directory / entry.directory).is_dir()]
            ledger["command"], ledger["jobs"] = command, [*kept, *entries]
        return entries

    def note(self, overrides: Sequence[str], directory: str, status: Status, error: str | None = None) -> None:
        """Enters what became of a job."""
        with self._open() as ledger:
            found = _find(ledger["jobs"], overrides)
            if found is None:
                found = Entry(list(overrides), directory)
                ledger["jobs"].append(found)
            found.directory, found.status, found.error = directory, status, error

    def entry(self, overrides: Sequence[str]) -> Entry | None:
        """The entry of a job."""
        return _find(self.entries(), overrides)

    def entries(self) -> list[Entry]:
        """All jobs, in the order in which they were entered."""
        return _entries(read_json(self.directory / LEDGER))

    def begun(self, jobs: Sequence[Entry]) -> list[str]:
        """Directories of those of ``jobs`` that were begun and have not told their end."""
        names = {entry.directory for entry in jobs}
        return [e.directory for e in self.entries() if e.directory in names and e.status == "running"]

    def abandoned(self, jobs: Sequence[Entry]) -> list[Entry]:
        """Those of ``jobs`` that were begun and that no process is at work on."""
        begun = self.begun(jobs)
        lost = [name for name in begun if not is_locked(self.directory / name)]
        return [entry for entry in self.entries() if entry.directory in lost and entry.status == "running"]

    def settle(self, jobs: Sequence[Entry], died: bool = False) -> list[Entry]:
        """Enters what has become of ``jobs`` when their command has ended.

        Args:
            jobs: of the command.
            died: whether those that were begun and not ended count as failed, rather than unfinished.

        Returns:
            The jobs as they are now.
        """
        for entry in self.abandoned(jobs):
            if died:
                write_failure(self.directory / entry.directory, DIED)
            self.note(entry.overrides, entry.directory, *(("failed", DIED) if died else ("unfinished",)))
        with self._open() as ledger:
            first = {entry.directory: entry for entry in ledger["jobs"] if entry.same_as is None}
            for entry in ledger["jobs"]:
                if entry.same_as in first:
                    entry.status, entry.error = first[entry.same_as].status, first[entry.same_as].error
        return [found for entry in jobs if (found := self.entry(entry.overrides)) is not None]

    @contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        with FileLock(self.directory / LOCK):
            file = self.directory / LEDGER
            found = read_json(file) or {"command": ""}
            found["jobs"] = _entries(found)
            yield found
            write_json(file, {**found, "jobs": [asdict(entry) for entry in found["jobs"]]})


def _entries(ledger: Any) -> list[Entry]:
    return [Entry(**job) for job in (ledger or {}).get("jobs", [])]


def _find(entries: Sequence[Entry], overrides: Sequence[str]) -> Entry | None:
    return next((entry for entry in entries if entry.overrides == list(overrides)), None)


def _read_status(entry: Entry, directory: Path) -> None:
    if is_finished(directory):
        entry.status = "finished"
    elif failure := read_failure(directory):
        entry.status, entry.error = "failed", failure["error"]


def show(jobs: Sequence[Entry], directory: Path) -> None:
    """Prints a row for each job (what sets it apart, what became of it, its win rate), then why jobs failed.

    Args:
        jobs: as :meth:`Ledger.settle` returns them.
        directory: of the sweep.
    """
    metrics = [read_json(directory / entry.directory / METRICS) or {} for entry in jobs]
    # Settings are chosen on the selection split; the test split's number is shown only where there is no other.
    key = "val/win_rate" if any("val/win_rate" in found for found in metrics) else "eval/win_rate"
    table = Table(box=None, pad_edge=False)
    for column in ("job", "status", key, ""):
        table.add_column(column, justify="right" if column == key else "left", overflow="fold")
    names = _names(jobs)
    for entry, name, found in zip(jobs, names, metrics, strict=True):
        rate = f"{found[key]:.3f}" if entry.status == "finished" and key in found else ""
        owner = next(index for index, other in enumerate(jobs) if other.directory == entry.directory)
        same = f"same as {names[owner]}" if entry.same_as else ""
        table.add_row(Text(name), Text(entry.status, _STYLES[entry.status]), rate, Text(same))
    console = Console()
    console.print(f"\nsweep {directory}", soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    for entry, name in zip(jobs, names, strict=True):
        if entry.error and not entry.same_as:
            words = f"{entry.status}: {name}: {entry.error}\n  in {directory / entry.directory}"
            console.print(Text(words, "red"), soft_wrap=True)
    counts = {status: sum(entry.status == status for entry in jobs) for status in _STYLES}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))


def _names(jobs: Sequence[Entry]) -> list[str]:
    """The overrides in which each job differs from others, or its directory where there are none."""
    common = set.intersection(*(set(entry.overrides) for entry in jobs)) if jobs else set()
    return [" ".join(text for text in entry.overrides if text not in common) or entry.directory for entry in jobs]
