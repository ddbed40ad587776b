"""The command ``spo clean``: list the cache and what killed processes left, and remove them on request."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spo.config.compose import compose
from spo.errors import SET_CACHE, UserError, placed_by
from spo.records import filenames
from spo.records.cache import abandoned_builds, cache_entries, last_use
from spo.records.files import remove
from spo.records.leftovers import leftovers
from spo.runs.claim import is_locked

LEFTOVERS = "leftovers"
STORES = {"reference_logps": "*.sqlite"}
"""Kinds of the cache that are files instead of folders with a manifest, and the pattern of their names."""
DAY_S = 86400


@dataclass(frozen=True)
class Item:
    """Something that may be removed.

    Attributes:
        kind: Kind of content: a folder of the cache, or :data:`LEFTOVERS`.
        path: File or folder.
        size: Bytes on the disk.
        used: Time of the last use, in seconds since the epoch.
    """

    kind: str
    path: Path
    size: int
    used: float


def clean_command(overrides: Sequence[str], *, delete: bool, older_than: float) -> list[Item]:
    """List entries of the cache and leftovers, and remove them if asked to. Records of runs stay.

    Args:
        overrides: Overrides of ``paths.outputs`` and ``paths.cache``, and of nothing else.
        delete: Whether to remove what is listed.
        older_than: Days without use from which on an item is listed.

    Returns:
        The items that are listed.

    Raises:
        UserError: An override is of another key, a run is at work, or something cannot be removed.
    """
    if other := [text for text in overrides if text.partition("=")[0] not in ("paths.outputs", "paths.cache")]:
        raise UserError(f"{other[0]}: spo clean takes paths.outputs=DIR and paths.cache=DIR")
    paths = compose(overrides, run_dir=".").paths
    outputs, cache = Path(paths.outputs).absolute(), Path(paths.cache).absolute()
    run_dirs = list(_run_dirs(outputs, cache))
    latest = time.time() - older_than * DAY_S
    items = [item for item in (*_cached(cache), *_leftovers(cache, run_dirs)) if item.used <= latest]
    _show(items, cache, outputs)
    if not delete:
        if items:
            print("nothing was removed; spo clean --delete removes these, and runs make what they need again")
        return items
    if working := [folder for folder in run_dirs if is_locked(folder)]:
        raise UserError(f"a process is at work in {working[0]}, which may read the cache: wait for it")
    with placed_by(SET_CACHE, cache):
        for item in items:
            remove(item.path)
    print(f"removed {len(items)} items, {_size(sum(item.size for item in items))}")
    return items


def _cached(cache: Path) -> Iterator[Item]:
    for path in cache_entries(cache):
        yield Item(path.parent.name, path, _bytes(path), last_use(path))
    for kind, pattern in STORES.items():
        for path in sorted((cache / kind).glob(pattern)):
            yield Item(kind, path, _bytes(path), path.stat().st_mtime)


def _leftovers(cache: Path, run_dirs: Sequence[Path]) -> Iterator[Item]:
    damaged = sorted(cache.glob("*/*.damaged"))
    written = [path for folder in run_dirs for path in leftovers(folder, is_locked=not is_locked(folder))]
    for path in (*abandoned_builds(cache), *damaged, *written):
        yield Item(LEFTOVERS, path, _bytes(path), path.lstat().st_mtime)


def _run_dirs(outputs: Path, cache: Path) -> Iterator[Path]:
    """Yield the run directories below a folder, without looking into them or into the cache."""
    for folder, names, files in os.walk(outputs):
        if filenames.IDENTITY in files or filenames.COMPOSED in files:
            names.clear()
            yield Path(folder)
        names[:] = sorted(name for name in names if Path(folder, name) != cache)


def _bytes(path: Path) -> int:
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def _show(items: Sequence[Item], cache: Path, outputs: Path) -> None:
    table = Table(box=None, pad_edge=False)
    for name, side in (("kind", "left"), ("items", "right"), ("size", "right"), ("last use", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for kind in sorted({item.kind for item in items}, key=lambda kind: (kind == LEFTOVERS, kind)):
        some = [item for item in items if item.kind == kind]
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(item.used for item in some)))
        table.add_row(kind, f"{len(some)}", _size(sum(item.size for item in some)), used)
    console = Console()
    console.print(f"cache    {cache}\noutputs  {outputs}", soft_wrap=True, markup=False, highlight=False)
    if items:
        console.print(table)
    else:
        console.print("there is nothing to remove")
    for item in items:
        if item.kind == LEFTOVERS:
            console.print(f"leftover {item.path}", soft_wrap=True, markup=False, highlight=False)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
