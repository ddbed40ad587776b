"""Checkpoints that are folders: what each holds, whether it is intact, and how one takes the place of another.

A folder cannot replace a folder in one step. So the older one is renamed first, and :func:`settle_checkpoints` ends
what a process that was killed in between has begun.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from spo.processes import deal, first_decides, gather, rank
from spo.records import filenames
from spo.records.files import read_mapping, remove, write_json

CHUNK_BYTES = 2**24
"""Bytes of a file that are in memory at once while its checksum is computed."""
THREADS = 16
"""Number of files that are read at once, to use the bandwidth of a shared disk."""
RUN_KEY = "run_identity"
"""Entry of a checkpoint that holds the digest of the run's identity; checkpoints of version 0.1.0 do not have it."""
UNFINISHED, OLDER, REMOVED = ("unfinished", "older", "removed")


@dataclass(frozen=True)
class Manifest:
    """Content of ``checkpoint.json``, which is written last, so that a folder without it is not complete.

    Attributes:
        step: Optimizer step of the checkpoint.
        run: Digest of the identity of the run, ``None`` outside of runs.
        files: Size in bytes and CRC-32 of each other file of the folder, by name.
    """

    step: int
    run: str | None
    files: dict[str, tuple[int, int]]


def write_manifest(folder: Path, step: int, run: str | None) -> None:
    """Write ``checkpoint.json`` into a folder whose other files are complete. All processes call this.

    Args:
        folder: Folder of a checkpoint, on a file system that all processes share.
        step: Optimizer step of the checkpoint.
        run: Digest of the identity of the run.
    """
    names = first_decides(lambda: sorted(file.name for file in folder.iterdir()))
    found = gather([_size_and_checksum(folder / name) for name in deal(names)])
    if rank() == 0:
        manifest = Manifest(step, run, dict(zip(names, found, strict=True)))
        write_json(folder / filenames.CHECKPOINT_MANIFEST, asdict(manifest))


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, ``None`` if it does not have a valid one."""
    found = read_mapping(folder / filenames.CHECKPOINT_MANIFEST)
    try:
        assert found is not None
        files = {str(name): (int(size), int(checksum)) for name, (size, checksum) in found["files"].items()}
        return Manifest(int(found["step"]), found["run"], files)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        return None


def is_intact(folder: Path) -> bool:
    """Return whether a folder has each file of its manifest, with the same bytes. It reads all of them."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    try:
        # Sizes first: they find a truncated file at once.
        if any((folder / name).stat().st_size != size for name, (size, _) in manifest.files.items()):
            return False
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(_size_and_checksum, [folder / name for name in manifest.files])
            return list(found) == list(manifest.files.values())
    except OSError:
        return False


def _size_and_checksum(file: Path) -> tuple[int, int]:
    size = checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum


# --- renaming --------------------------------------------------------------------------------------------------------


def unfinished_path(path: Path) -> Path:
    """Return the name that a checkpoint has until it is complete."""
    return _beside(path, UNFINISHED)


def take_place(path: Path) -> None:
    """Give a complete checkpoint its name, in place of an earlier one; each of them may be a file or a folder.

    Args:
        path: Name of the checkpoint, which is at :func:`unfinished_path` by now.
    """
    complete, older = unfinished_path(path), _beside(path, OLDER)
    if path.is_dir() or (path.exists() and complete.is_dir()):
        remove(older)
        path.rename(older)
    complete.replace(path)
    remove(older)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, which disappears in one step."""
    removed = _beside(path, REMOVED)
    remove(removed)
    path.rename(removed)
    remove(removed)


def settle_checkpoints(folder: Path, names: Iterable[str]) -> None:
    """End what a killed process has begun: no checkpoint is lost between two renames, and nothing else stays.

    The caller is the only process that uses the folder.

    Args:
        folder: Folder of checkpoints.
        names: Names of the checkpoints that always exist once they were written.
    """
    for name in names:
        path = folder / name
        candidates = [_beside(path, kind) for kind in (UNFINISHED, OLDER)]
        # A file replaces a file in one step, so only folders can be between two names.
        if not path.exists() and (found := next((one for one in candidates if read_manifest(one)), None)):
            found.rename(path)
    for kind in (UNFINISHED, OLDER, REMOVED):
        for leftover in folder.glob(f".*.{kind}"):
            remove(leftover)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")
