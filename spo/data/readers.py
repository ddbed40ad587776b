"""Readers of jsonl, csv and parquet files, which yield an error in place of a record that cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

from spo.data.cells import describe_type, without_nulls
from spo.data.findings import Findings
from spo.data.rows import DataError, RowError

Record = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
_csv_limit = Lock()


def data_files(path: Path, key: str = "data.path") -> list[Path]:
    """Return the file at ``path``, or the data files of a folder in alphabetical order; hidden files are ignored.

    Args:
        path: Path of the file or folder.
        key: Key of the configuration that names it, for messages.

    Raises:
        DataError: If the path does not exist, is a folder without data files, or is a file of another kind.
    """
    if not path.exists():
        raise DataError(f"{key}={path}: no such file or folder (looked in {path.absolute().parent})")
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.name.endswith(SUFFIXES) and not file.name.startswith(".")
        )
        if not files:
            raise DataError(f"{key}={path}: the folder does not contain a {', '.join(SUFFIXES)} file")
        return files
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{key}={path}: not a {', '.join(SUFFIXES)} file")
    return [path]


def read_records(
    file: Path, findings: Findings, numbers: Collection[str] = ("preference", "weight")
) -> Iterator[tuple[str, Record | RowError]]:
    """Yield the records of a file, each with its file and line; the error takes the place of an unreadable record.

    Args:
        file: Data file.
        findings: Counts, to which records with duplicate keys are added.
        numbers: Columns of a csv file that hold numbers, and not text.
    """
    if file.suffix == ".parquet":
        return _parquet_records(file, findings)
    return _csv_records(file, findings, numbers) if file.suffix == ".csv" else _jsonl_records(file, findings)


def _jsonl_records(file: Path, findings: Findings) -> Iterator[tuple[str, Record | RowError]]:
    duplicates = 0

    def build(pairs: list[tuple[str, Any]]) -> Record:
        nonlocal duplicates
        built = dict(pairs)
        duplicates += len(built) < len(pairs)
        return built

    for where, line in _lines(file):
        if isinstance(line, RowError):
            yield where, line
            continue
        try:
            text = line.decode("utf-8-sig")  # This codec drops a byte order mark.
            if not text.strip():
                continue
            duplicates = 0
            record = json.loads(text, object_pairs_hook=build)
        except UnicodeDecodeError as error:
            yield where, RowError(where, f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})")
        except (ValueError, RecursionError) as error:  # Deeply nested JSON exceeds the recursion limit.
            yield where, RowError(where, f"not valid JSON: {error}")
        else:
            if duplicates:
                findings.add("duplicate_keys", where)
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


def _csv_records(file: Path, findings: Findings, numbers: Collection[str]) -> Iterator[tuple[str, Record | RowError]]:
    # Undecodable bytes become lone surrogates, so that `cells` reports them with their row.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{file}, line {reader.line_num + 1}"
            try:
                with _csv_limit:
                    # The limit on the length of a field is global, so it is raised for this record only.
                    limit = csv.field_size_limit(2**31 - 1)
                    try:
                        fields = next(reader, None)
                    finally:
                        csv.field_size_limit(limit)
            except csv.Error as error:
                yield where, RowError(where, f"not valid csv: {error}")
                continue
            if fields is None:
                return
            if header is None:
                header = fields
            elif len(fields) == len(header):
                if len(set(header)) < len(header):
                    findings.add("duplicate_keys", where)
                cells = zip(header, fields, strict=True)
                yield where, {name: _csv_number(value) if name in numbers else value for name, value in cells}
            elif fields:
                yield where, RowError(where, f"has {len(fields)} fields, but the header has {len(header)}")


def _csv_number(value: str) -> Any:
    """Return a csv value as a number, true or false, or a list of numbers; ``None`` for white space.

    Every csv value is text. What cannot be read stays text, which the checks of a row report.
    """
    if not value.strip():
        return None
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return json.loads(value.lower())  # Other tools write True, and lists as JSON does.
    except (ValueError, RecursionError):
        return value


def _parquet_records(file: Path, findings: Findings) -> Iterator[tuple[str, Record | RowError]]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            # Batch by batch, so that the whole table is not in memory twice.
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    row += 1
                    where = f"{file}, row {row}"
                    if len(record) < len(names):
                        findings.add("duplicate_keys", where)
                    yield where, {column: without_nulls(value) for column, value in record.items()}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"{file}, row {row + 1}"
        yield where, RowError(where, f"not a readable parquet file: {error}")
