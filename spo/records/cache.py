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


def cached(root: str | Path, kind: str, key: dict[str, Any], build: Callable[[Path | None], None]) -> Path:
    """Return the folder that ``build`` fills, built once per key. All processes of a run call this together.

    One run at a time builds it, under a temporary name, and renames it when it is complete; other runs wait. Each call
    checks the digests of the files and rebuilds a damaged entry. An entry is read without a lock, so a cache that
    cannot be written works as far as it is filled.

    The first process of a run decides whether the entry is missing, and completes it. The others get its path, so the
    cache must lie in a file system that all nodes share.

    Args:
        root: Folder of the cache.
        kind: Kind of content, such as ``"sft"``; the name of a folder in the cache.
        key: JSON-like values that determine the content, the same in all processes.
        build: Function that all processes call if the entry is missing, so that they can share the work. The first
            process gets the empty folder to fill. The others get ``None`` and write nothing.

    Returns:
        Absolute path of the complete folder.

    Raises:
        UserError: The entry is missing or damaged, and the cache cannot be written.
        PeerLostError: Another process of the run has ended, for example because its part of the build failed.
    """
    folder = Path(root).resolve() / kind / digest(key)[:32]
    if rank() == 0:
        with placed_by(SET_CACHE, folder.parents[1]):
            _provide(folder, key, build)
    elif share(False):  # The first process answers whether the entry is missing.
        build(None)
    return share(folder)


def find_cached(root: str | Path, kind: str, key: dict[str, Any]) -> Path | None:
    """Return the complete folder that :func:`cached` has built for a key, ``None`` if it is missing or damaged.

    Args:
        root: Folder of the cache.
        kind: Kind of content.
        key: JSON-like values that determine the content.
    """
    folder = Path(root).resolve() / kind / digest(key)[:32]
    return folder if _is_intact(folder) else None


def build_alone(build: Callable[[Path], None]) -> Callable[[Path | None], None]:
    """Return a build for :func:`cached` in which the first process does everything.

    Args:
        build: Function that fills the empty folder that it receives.
    """

    def build_on_first(folder: Path | None) -> None:
        if folder is not None:
            build(folder)

    return build_on_first


def _provide(folder: Path, key: dict[str, Any], build: Callable[[Path | None], None]) -> None:
    """Build an entry if it is missing, in the first process, which tells the others before it builds."""
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
            log.warning("the cached %s in %s is damaged: building it again", folder.parent.name, folder)
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
