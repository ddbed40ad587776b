"""Readers and writers of JSON, JSON lines and YAML."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from spo.errors import UserError
from spo.secrets import scrub

log = logging.getLogger(__name__)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically and without secrets: readers see the old content or the whole new one.

    Raises:
        OSError: The file cannot be written; the error names it.
    """
    temporary = temporary_path(file)
    try:
        temporary.write_text(scrub(text), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from error


def temporary_path(path: Path) -> Path:
    """Return the name under which this process writes a file or folder until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def visible_names(folder: Path) -> list[str]:
    """Return the sorted names in a folder that do not start with a dot; empty if the folder is missing."""
    return sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write a folder atomically: it takes the place of an older one when the block ends without an error.

    Yields:
        An empty folder beside it, to be filled.
    """
    temporary = temporary_path(folder)
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        older = temporary_path(folder.with_name(f"{folder.name}.older"))
        if folder.exists():
            folder.rename(older)
        temporary.rename(folder)
        remove(older)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_aside(file: Path) -> None:
    """Rename a damaged file or folder to ``NAME.damaged``, with a warning, so that a new one can be written."""
    numbers = (file.with_name(f"{file.name}.damaged{suffix}") for suffix in ("", *(f".{n}" for n in range(1, 1000))))
    aside = next(path for path in numbers if not path.exists())
    file.rename(aside)
    log.warning("%s is damaged: it was moved to %s and is written anew", file, aside.name)


def to_json(value: Any, **settings: Any) -> str:
    """Return a value as JSON that every reader accepts.

    Python would write NaN and infinities as words that JSON does not have; they become null.

    Args:
        value: JSON-like value.
        settings: Further arguments of ``json.dumps``.
    """
    try:
        return json.dumps(value, allow_nan=False, **settings)
    except ValueError as error:  # The copy costs more than the text, and only few values need it.
        if "float" not in str(error):
            raise
        return json.dumps(_without_nonfinite(value), allow_nan=False, **settings)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key) if isinstance(key, float) else key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(file: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically; numbers that are not finite become null.

    Args:
        file: JSON file.
        value: JSON-like value; what JSON does not know becomes text.
        indent: Spaces per level, ``None`` for a single line, which is several times faster.
    """
    write_text(file, to_json(value, indent=indent, default=str) + "\n")


def read_json(file: Path) -> Any:
    """Return the value of a JSON file, ``None`` where the file is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_mapping(file: Path) -> dict[str, Any] | None:
    """Return the object of a JSON file, ``None`` where the file is missing, damaged or holds something else."""
    value = read_json(file)
    return value if isinstance(value, dict) else None


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically; numbers that are not finite become null."""
    write_text(file, "".join(_line(row) for row in rows))


def _line(row: Mapping[str, Any]) -> str:
    line = to_json(row, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # UTF-8 cannot hold a lone surrogate, an escape sequence can
        return to_json(row) + "\n"
    return line


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines.

    Raises:
        OSError: The file cannot be read.
        UserError: The file is not text, or a line is not a JSON object.
    """
    rows = []
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text in UTF-8; the file is damaged") from error
    for number, row in parse_jsonl(text):
        if row is None:
            raise UserError(f"{file}, line {number}: not a JSON object; the file is damaged")
        rows.append(row)
    return rows


def parse_jsonl(text: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Parse JSON lines, skipping blank ones.

    Yields:
        The line number, from 1, and the object; ``None`` where the line is not a JSON object.
    """
    # `splitlines` would also split at U+2028 and the like, which a text in a row may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield number, row if isinstance(row, dict) else None


def load_yaml(text: str) -> Any:
    """Parse YAML of plain values, ten times faster where PyYAML has its C extension.

    Raises:
        yaml.YAMLError: The text is not valid YAML.
    """
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def flatten(value: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return nested mappings as a single one, with joined keys such as ``data.source.path``.

    Args:
        value: Nested mappings. An empty one inside stays as a value.
        separator: Text between the parts of a key.
    """
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= {f"{name}{separator}{key}": leaf for key, leaf in flatten(item, separator).items()}
        else:
            flat[str(name)] = item
    return flat
