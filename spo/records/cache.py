"""A content-addressed cache of folders: what is expensive to make and follows from what is known beforehand."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def path_digest(path: str | Path) -> str:
    """SHA-256 over the names and bytes of a file, or of all files of a folder; of the name where neither exists."""
    root, whole = Path(path).expanduser(), hashlib.sha256()
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    whole.update(b"" if files else str(path).encode())
    for file in files:
        whole.update(file.name.encode())
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def cached(root: str | Path, kind: str, key: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that ``build`` fills, made once per key.

    It is built under a temporary name and renamed when complete, by one process at a time; the others wait for it.
    A damaged entry (a file changed, cut or lost) is noticed by its digests and built again.

    Args:
        root: of the cache.
        kind: what is cached; a folder of its own.
        key: everything the content follows from.
        build: fills the empty folder it is given.

    Returns:
        The complete folder, absolute.
    """
    folder = Path(root).resolve() / kind / digest(key)[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            if _intact(folder):
                return folder
            log.warning("the cached %s in %s is damaged: building it again", kind, folder)
            shutil.rmtree(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            build(temporary)
            manifest = {"key": key, "files": _file_digests(temporary)}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True, default=str))
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def _file_digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _intact(folder: Path) -> bool:
    try:
        recorded = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return False
    return recorded == _file_digests(folder)
