"""The command ``spo compare``: from run directories to the terminal and the files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spo.comparison.compare import Comparison, compare
from spo.comparison.runs import find_runs
from spo.errors import placed_by
from spo.pages.comparison_files import write_files
from spo.pages.comparison_page import write_page
from spo.pages.comparison_table import print_comparison
from spo.records import filenames


def compare_command(
    paths: Sequence[Path],
    *,
    out: Path | None = None,
    by: str | Sequence[str] = (),
    metric: str | None = None,
    select: str | None = None,
    baseline: str | None = None,
    anyway: bool = False,
) -> Comparison:
    """Compare runs, print the table and write the files.

    Args:
        paths: Sweep directories and run directories.
        out: Folder of the files; ``None`` for ``comparison`` next to the runs.
        by: Keys whose values make a group, as in :func:`spo.comparison.compare.compare`.
        metric: Metric by which methods are ranked, as in the same function.
        select: Metric by which the best settings are selected, as in the same function.
        baseline: Name of the method or group that others are compared with, as in the same function.
        anyway: Whether to continue with an unfair comparison, as in the same function.

    Raises:
        UserError: If the runs cannot be compared, or not fairly.
    """
    found = find_runs(paths)
    comparison = compare(found, by=by, metric=metric, select=select, baseline=baseline, anyway=anyway)
    folder = out or _beside(paths)
    with placed_by("give another folder with --out", folder):
        files = [write_page(comparison, folder), *write_files(comparison, folder).values()]
    print_comparison(comparison)
    for file in files:
        print(f"{file.suffix.removeprefix('.'):5s}{file}")
    return comparison


def _beside(paths: Sequence[Path]) -> Path:
    """Return the folder ``comparison`` inside the folder that contains all of the runs."""
    folders = [path.resolve().parent if (path / filenames.IDENTITY).is_file() else path.resolve() for path in paths]
    return Path(os.path.relpath(os.path.commonpath(folders))) / filenames.COMPARISON
