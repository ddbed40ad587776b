"""A content-addressed cache of folders: their content is expensive to make and follows from a key."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spo.errors import SET_CACHE, placed_by
from spo.processes import rank, share
from spo.records.digests import digest, folder_digests
from spo.records.files import read_mapping, remove, write_json

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
# Names of entries, and of the temporary folders in which they are built.
_ENTRY = re.compile(r"[0-9a-f]{32}")
_BUILD = re.compile(r"[0-9a-f]{32}\.[a-z0-9_]{8}")


def cached(root: str | Path, kind: str, key: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Return the folder that ``build`` fills, built once per key.

    Each call checks the digests of the files and rebuilds a damaged entry. An entry is read without a lock, so a cache
    that cannot be written works as far as it is filled. Several runs may use the cache: one of them builds an entry,
    under a temporary name, and renames it when it is complete; the others wait.

    All processes of a run call this together. The first one decides whether the entry is there, and builds it while
    the others wait. They get the path alone, so the cache must lie in a file system that all nodes share.

    Args:
        root: Folder of the cache.
        kind: Kind of content, such as ``"sft"``; the name of a folder in the cache.
        key: JSON-like values that determine the content.
        build: Function that fills the empty folder that it receives.

    Returns:
        Absolute path of the complete folder.

    Raises:
        UserError: The entry is missing or damaged, and the cache cannot be written.
        PeerLostError: Another process of the run has ended, for example because its part of the build failed.
    """

    def build_alone(folder: Path | None) -> None:
        if folder is not None:
            build(folder)

    return cached_together(root, kind, key, build_alone)


def cached_together(root: str | Path, kind: str, key: dict[str, Any], build: Callable[[Path | None], None]) -> Path:
    """Do what :func:`cached` does, with a ``build`` to which all processes of the run contribute.

    Args:
        root: Folder of the cache.
        kind: Kind of content.
        key: JSON-like values that determine the content.
        build: Function that all processes call where the entry is missing, so that it may let them share work. The
            first process gets the empty folder to fill. The others get ``None`` and write nothing.
    """
    root = Path(root).resolve()
    folder = root / kind / digest(key)[:32]
    if rank() == 0:
        with placed_by(SET_CACHE, root):
            _provide(folder, kind, key, build)
    elif share(False):  # The first process answers whether it builds.
        build(None)
    return share(folder)


def _provide(folder: Path, kind: str, key: dict[str, Any], build: Callable[[Path | None], None]) -> None:
    """Find or build an entry in the first process, which tells the others whether it builds."""
    if _is_intact(folder):
        _note_use(folder)
        share(False)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock(folder)):
        if _is_intact(folder):  # Another run has built it in the meantime.
            share(False)
            return
        if folder.exists():
            log.warning("the cached %s in %s is damaged: building it again", kind, folder)
            remove(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            share(True)
            build(temporary)
            manifest = {"key": key, "files": folder_digests(temporary, without=MANIFEST)}
            write_json(temporary / MANIFEST, manifest)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def cache_entries(root: Path) -> Iterator[Path]:
    """Yield the folders of a cache that :func:`cached` has completed."""
    yield from (path for path in sorted(root.glob("*/*")) if _ENTRY.fullmatch(path.name) and path.is_dir())


def abandoned_builds(root: Path) -> Iterator[Path]:
    """Yield the temporary folders of builds whose process is dead. The lock of the entry, which is free, proves it.

    An entry stays locked until the caller asks for the next one.
    """
    for path in sorted(root.glob("*/*")):
        if _BUILD.fullmatch(path.name) is None:
            continue
        lock = FileLock(_lock(path.with_suffix("")))
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError, NotImplementedError):
            continue
        try:
            yield path
        finally:
            lock.release()


def last_use(entry: Path) -> float:
    """Return when an entry was built or read last, in seconds since the epoch."""
    try:
        return (entry / MANIFEST).stat().st_mtime
    except OSError:
        return entry.stat().st_mtime


def _note_use(folder: Path) -> None:
    with suppress(OSError):  # The cache may be read-only.
        os.utime(folder / MANIFEST)


def _lock(folder: Path) -> str:
    return f"{folder}.lock"


def _is_intact(folder: Path) -> bool:
    manifest = read_mapping(folder / MANIFEST)
    return manifest is not None and manifest.get("files") == folder_digests(folder, without=MANIFEST)
