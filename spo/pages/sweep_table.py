"""The table that ``spo train -m`` prints at the end of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spo.metrics.rounds import round_metrics
from spo.metrics.trained import COSTS, cost_text
from spo.records import filenames
from spo.records.files import read_json
from spo.records.iteration import is_iteration, read_iteration
from spo.records.sweep import JobStatus, SweepJob
from spo.wording import finite

_STYLES: dict[JobStatus, str] = {"finished": "green", "failed": "red", "running": "yellow", "unfinished": "yellow"}

FIRST_RATE = "win rate against the first model"
"""Header of the numbers of iterations."""


def print_sweep(jobs: Sequence[SweepJob], directory: Path) -> None:
    """Print one row per job (its own overrides, state, win rate and costs), then the errors of failed jobs.

    Args:
        jobs: Jobs with their final states.
        directory: Sweep directory.
    """
    metrics = [_metrics(directory / entry.directory) for entry in jobs]
    # Settings are chosen on the selection split; the number of the test split is shown only if there is no other.
    keys = (FIRST_RATE, "val/win_rate", "eval/win_rate")
    key = next((key for key in keys if any(key in found for found in metrics)), keys[-1])
    table = Table(box=None, pad_edge=False)
    costs = [f"{name} ({unit})" for name, unit in COSTS.values()]
    for column in ("job", "status", key, *costs, ""):
        table.add_column(column, justify="right" if column in (key, *costs) else "left", overflow="fold")
    labels = _labels(jobs)
    for entry, name, found in zip(jobs, labels, metrics, strict=True):
        rate = f"{found[key]:.3f}" if entry.status == "finished" and key in found else ""
        spent = [cost_text(name, finite(found.get(name))) if entry.status == "finished" else "" for name in COSTS]
        owner = next(index for index, other in enumerate(jobs) if other.directory == entry.directory)
        same = f"same as {labels[owner]}" if entry.same_as else ""
        table.add_row(Text(name), Text(entry.status, _STYLES[entry.status]), rate, *spent, Text(same))
    console = Console()
    console.print(f"\nsweep {directory}", soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    for entry, name in zip(jobs, labels, strict=True):
        if entry.error and not entry.same_as:
            words = f"{entry.status}: {name}: {entry.error}\n  in {directory / entry.directory}"
            console.print(Text(words, "red"), soft_wrap=True)
    counts = {status: sum(entry.status == status for entry in jobs) for status in _STYLES}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))


def _metrics(job: Path) -> dict[str, Any]:
    """Return the metrics of a run, or the win rate of the last round of an iteration against the first model."""
    if not is_iteration(job):
        return read_json(job / filenames.METRICS) or {}
    iteration = read_iteration(job)
    last = round_metrics(job, iteration, iteration.rounds[-1].number)
    return {FIRST_RATE: last.win_rates["first"].value} if "first" in last.win_rates else {}


def _labels(jobs: Sequence[SweepJob]) -> list[str]:
    """Return the overrides in which each job differs from others, or its directory where there are none."""
    common = set.intersection(*(set(entry.overrides) for entry in jobs)) if jobs else set()
    return [" ".join(text for text in entry.overrides if text not in common) or entry.directory for entry in jobs]
