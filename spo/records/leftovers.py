"""Temporary files and folders of processes that were killed while they wrote."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from spo.records import filenames
from spo.records.cache import abandoned_builds
from spo.records.files import remove

# A name that `temporary_path` returns.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+")
MAX_WRITING_S = 3600
"""Seconds after which a temporary file that no lock protects counts as a leftover."""


def leftovers(run_dir: Path, *, is_locked: bool) -> Iterator[Path]:
    """Yield the temporary files and folders in a run directory whose writer is dead.

    Args:
        run_dir: Run directory.
        is_locked: Whether the caller has the lock of the directory, which proves that the run is not writing. Only the
            page is written without the lock.
    """
    for path in sorted(run_dir.iterdir()) if run_dir.is_dir() else ():
        found = _TEMPORARY.fullmatch(path.name)
        if found is None:
            continue
        with suppress(OSError):
            is_old = time.time() - path.lstat().st_mtime > MAX_WRITING_S
            if is_old or (is_locked and found["name"] != filenames.REPORT):
                yield path


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed process left in a run directory. The caller has its lock."""
    for path in list(leftovers(run_dir, is_locked=True)):
        with suppress(OSError):
            remove(path)


def remove_abandoned_builds(cache: Path) -> None:
    """Remove what killed processes left in a cache."""
    for path in abandoned_builds(cache):
        with suppress(OSError):
            remove(path)
