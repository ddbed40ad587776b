"""A content-addressed cache of folders: their content is expensive to make and follows from a key."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from spo.records.digests import digest, file_digest
from spo.records.files import read_json, to_json

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


def cached(root: str | Path, kind: str, key: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Return the folder that ``build`` fills, built once per key.

    One process at a time builds it, under a temporary name, and renames it when it is complete; other processes wait.
    Each call checks the digests of the files and rebuilds a damaged entry.

    Args:
        root: Folder of the cache.
        kind: Kind of content, such as ``"sft"``; the name of a folder in the cache.
        key: JSON-like values that determine the content.
        build: Function that fills the empty folder that it receives.

    Returns:
        Absolute path of the complete folder.
    """
    folder = Path(root).resolve() / kind / digest(key)[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            if _is_intact(folder):
                return folder
            log.warning("the cached %s in %s is damaged: building it again", kind, folder)
            shutil.rmtree(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            build(temporary)
            manifest = {"key": key, "files": _file_digests(temporary)}
            (temporary / MANIFEST).write_text(to_json(manifest, indent=2, sort_keys=True, default=str))
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def _file_digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def _is_intact(folder: Path) -> bool:
    manifest = read_json(folder / MANIFEST)
    return isinstance(manifest, dict) and manifest.get("files") == _file_digests(folder)
