"""Readers of jsonl, csv and parquet files, which yield an error in place of a record that cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spo.data.cells import describe_type
from spo.data.rows import DataError, RowError

Record = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")


def data_files(path: Path) -> list[Path]:
    """Return the file at ``path``, or the data files of a folder in alphabetical order; hidden files are ignored.

    Raises:
        DataError: If the path does not exist, is a folder without data files, or is a file of another kind.
    """
    if not path.exists():
        raise DataError(f"data.path={path}: no such file or folder (looked in {path.absolute().parent})")
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.name.endswith(SUFFIXES) and not file.name.startswith(".")
        )
        if not files:
            raise DataError(f"data.path={path}: the folder does not contain a {', '.join(SUFFIXES)} file")
        return files
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"data.path={path}: not a {', '.join(SUFFIXES)} file")
    return [path]


def read_records(file: Path) -> Iterator[tuple[str, Record | RowError]]:
    """Yield the records of a file, each with its file and line; the error takes the place of an unreadable record."""
    if file.suffix == ".parquet":
        return _parquet_records(file)
    return _csv_records(file) if file.suffix == ".csv" else _jsonl_records(file)


def _jsonl_records(file: Path) -> Iterator[tuple[str, Record | RowError]]:
    for where, line in _lines(file):
        if isinstance(line, RowError):
            yield where, line
            continue
        try:
            text = line.decode("utf-8-sig")  # This codec drops a byte order mark.
            if not text.strip():
                continue
            record = json.loads(text)
        except UnicodeDecodeError as error:
            yield where, RowError(where, f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})")
        except (ValueError, RecursionError) as error:  # Deeply nested JSON exceeds the recursion limit.
            yield where, RowError(where, f"not valid JSON: {error}")
        else:
            if isinstance(record, dict):
                yield where, record
            else:
                yield where, RowError(where, f"must be a JSON object, not {describe_type(record)}")


def _lines(file: Path) -> Iterator[tuple[str, bytes | RowError]]:
    # Bytes, not text: a line that is not UTF-8 must not end the file.
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield f"{file}, line {number}", line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        where = f"{file}, line {number + 1}"
        yield where, RowError(where, f"the gzip file is cut off or damaged here ({error}); the rest is lost")


def _csv_records(file: Path) -> Iterator[tuple[str, Record | RowError]]:
    # Undecodable bytes become lone surrogates, so that `cells` reports them with their row.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{file}, line {reader.line_num + 1}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield where, RowError(where, f"not valid csv: {error}")
                continue
            if fields is None:
                return
            if header is None:
                header = fields
            elif len(fields) == len(header):
                yield where, {column: _csv_value(column, value) for column, value in zip(header, fields, strict=True)}
            elif fields:
                yield where, RowError(where, f"has {len(fields)} fields, but the header has {len(header)}")


def _csv_value(column: str, value: str) -> Any:
    # Every csv value is text. A number that cannot be read stays text, which the checks of a row report.
    if column not in ("preference", "weight"):
        return value
    try:
        return float(value) if value.strip() else None
    except ValueError:
        return value


def _parquet_records(file: Path) -> Iterator[tuple[str, Record | RowError]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            # Batch by batch, so that the whole table is not in memory twice.
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    row += 1
                    yield f"{file}, row {row}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"{file}, row {row + 1}"
        yield where, RowError(where, f"not a readable parquet file: {error}")
