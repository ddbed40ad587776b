"""Digests of values, files, models and code: what runs and caches are identified by."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import spo

# Suffixes of the files of a model folder that decide what the model computes.
MODEL_SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py"}
FORWARD_CODE = ("types", "batching.py", "processes.py", "ops", "models", "forward")
"""Files and folders that the log-probs of a model depend on. Caches of what a model computes list them, and others."""
SAMPLING_CODE = (*FORWARD_CODE, "sampling", "seeds.py")
"""Files and folders that the samples of a model depend on."""


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_digests(folder: Path, without: str = "") -> dict[str, str]:
    """Return the SHA-256 of each file in a folder and its subfolders, by relative path.

    Args:
        folder: Folder.
        without: Name of files that do not count.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != without)
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}


def path_digest(path: str | Path) -> str:
    """Return the SHA-256 over the names and bytes of a file or of all files of a folder.

    Where neither exists, it is the SHA-256 of the path itself.
    """
    root = Path(path).expanduser()
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    whole = hashlib.sha256(b"" if files else str(path).encode())
    for file in files:
        whole.update(file.name.encode() + bytes.fromhex(file_digest(file)))
    return whole.hexdigest()


def model_digest(path: str | Path) -> str:
    """Return the SHA-256 of a model: of its weights, configuration and tokenizer.

    Args:
        path: Model folder, or a name on the Hugging Face hub. A name stands for the snapshot in the local cache.
    """
    folder = Path(path)
    whole = hashlib.sha256()
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.suffix in MODEL_SUFFIXES:
                whole.update(file.name.encode() + bytes.fromhex(file_digest(file)))
        return whole.hexdigest()
    # Imported here because it takes seconds, and folders do not need it.
    from transformers.utils import cached_file

    try:
        config = cached_file(str(path), "config.json")
    except OSError:
        config = None  # Loading the model reports that it is missing.
    snapshot = "" if config is None else Path(config).parent.name  # The folder is named after the commit.
    whole.update(json.dumps([str(path), snapshot]).encode())
    return whole.hexdigest()


@cache
def code_version(*parts: str) -> str:
    """Return the version of the package and a digest of its code, such as ``0.1.0+1a2b3c4d5e6f``.

    Args:
        parts: Files and folders of the package that count, relative to it; all of them if none is given.

    Raises:
        ValueError: The package does not have one of the parts.
    """
    root = Path(spo.__file__).parent
    if missing := [part for part in parts if not (root / part).exists()]:
        raise ValueError(f"no such file or folder in the package: {', '.join(missing)}")
    whole = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        if parts and not any(file.is_relative_to(root / part) for part in parts):
            continue
        whole.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{spo.__version__}+{whole.hexdigest()[:12]}"
