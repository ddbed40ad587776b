"""Preference rows from files, HH transcripts and the Hugging Face hub, in TRL's formats, checked row by row.

Every reader yields ``(where, record)``; a record that could not even be read arrives as a `RowError` in its place, so
one loop decides what a bad row does: stop the run, or be skipped, counted and listed.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge

from spo.bounds import OnBadRow
from spo.data.rendering import prompt_id
from spo.data.rows import Completer, DataError, Message, Row, RowError, Split, Text

Record = dict[str, Any]
COLUMNS = ("prompt", "chosen", "rejected", "preference", "weight")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
_ASSISTANT = "\n\nAssistant:"


class NoPreference(RowError):
    """A well-formed row that says nothing: an empty completion, or chosen equal to rejected.

    Published data sets hold a few of them, so they never stop a run: they are skipped, counted and listed.
    """


class TableSource(ABC):
    """A source of records with the columns ``chosen``, ``rejected`` and perhaps ``prompt``, ``preference``, ``weight``.

    Other columns are ignored. After `rows`, ``bad_rows`` lists what was skipped and ``counts`` holds ``read`` and
    ``skipped``.

    Args:
        on_bad_row: ``stop`` raises at the first malformed row, ``skip`` skips, counts and lists it.
        columns: the data's own name for each of our columns that it calls otherwise, or ``None``.
    """

    samples_rows = False
    known: ClassVar[tuple[str, ...]] = COLUMNS

    def __init__(self, on_bad_row: OnBadRow, columns: Mapping[str, str] | None) -> None:
        if on_bad_row not in ("stop", "skip"):
            raise DataError(f"data.on_bad_row={on_bad_row}: choose stop or skip")
        if unknown := set(columns or {}) - set(self.known):
            raise DataError(
                f"data.source.columns: unknown {sorted(unknown)}; it maps {', '.join(self.known)} to the data's names"
            )
        self.on_bad_row = on_bad_row
        self.columns = dict(columns or {})
        self.bad_rows: list[RowError] = []
        self.counts: dict[str, int] = {"read": 0, "skipped": 0}

    @property
    @abstractmethod
    def name(self) -> str:
        """What a person calls this data."""

    @abstractmethod
    def records(self) -> Iterator[tuple[str, Split | None, Record | RowError]]:
        """Where each record stands, the split that the source assigns to it, and the record."""

    def sft_rows(self) -> list[Row] | None:
        """``None``: the chosen completions are the supervised data."""
        return None

    def rows(self, complete: Completer) -> list[Row]:
        """The rows that can be used.

        Args:
            complete: not called; this source brings its own completions.

        Raises:
            RowError: at the first malformed row, when ``on_bad_row`` is ``stop``.
            DataError: when the data is missing, or none of it can be used.
        """
        rows: list[Row] = []
        self.bad_rows = []
        read = 0
        for where, split, record in self.records():
            read += 1
            try:
                if isinstance(record, RowError):
                    raise record
                rows.append(self.parse(record, where, split))
            except RowError as error:
                if self.on_bad_row == "stop" and not isinstance(error, NoPreference):
                    raise
                self.bad_rows.append(error)
        self.counts = {"read": read, "skipped": len(self.bad_rows)}
        if not rows:
            first = f"; the first problem: {self.bad_rows[0]}" if self.bad_rows else ""
            raise DataError(f"{self.name}: none of its {read} rows can be used{first}")
        return rows

    def parse(self, record: Record, where: str, split: Split | None) -> Row:
        """One record as a row.

        Raises:
            RowError: with the column and the reason.
        """
        chosen, rejected = (self._text(record, name, where) for name in ("chosen", "rejected"))
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise RowError(where, "one of chosen and rejected is text, the other a list of messages", "rejected")
        named = self.columns.get("prompt", "prompt")
        prompt: Text | None = None
        if "prompt" in self.columns or record.get(named) is not None:
            prompt = self._text(record, "prompt", where)
        # A text prompt beside message lists repeats what the lists already begin with (UltraFeedback's form).
        if prompt is None or (isinstance(prompt, str) and not isinstance(chosen, str)):
            prompt, chosen, rejected = self.split_prompt(chosen, rejected, where)
        elif isinstance(chosen, str) and not isinstance(prompt, str):
            raise RowError(where, "a list of messages, but the completions are text", named)
        for name, completion in (("chosen", chosen), ("rejected", rejected)):
            if _is_empty(completion):
                raise NoPreference(where, "the completion is empty", self.columns.get(name, name))
        if chosen == rejected:
            raise NoPreference(where, "chosen and rejected are equal", self.columns.get("rejected", "rejected"))
        preference = self._number(record, "preference", where, 1.0)
        weight = self._number(record, "weight", where, math.inf)
        return Row(prompt, chosen, rejected, preference, weight, split, where)

    def split_prompt(self, chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
        """Cuts two whole texts (or conversations) into their shared prompt and the two completions."""
        if isinstance(chosen, str) and isinstance(rejected, str):
            cut = shared_text(chosen, rejected)
        else:
            cut = shared_messages(chosen, rejected)  # type: ignore[arg-type]
        return chosen[:cut], chosen[cut:], rejected[cut:]

    def _text(self, record: Record, name: str, where: str) -> Text:
        column = self.columns.get(name, name)
        if column not in record:
            raise RowError(where, f"missing; the row has {', '.join(map(str, record)) or 'no columns'}", column)
        return _text(record[column], where, column)

    def _number(self, record: Record, name: str, where: str, highest: float) -> float | None:
        column = self.columns.get(name, name)
        value = record.get(column)
        if value is None:
            if name in self.columns and column not in record:
                raise RowError(where, f"missing; the row has {', '.join(map(str, record))}", column)
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RowError(where, f"must be a number, not {_kind(value)}", column)
        # Written so that NaN fails it.
        if not 0 <= value <= highest or value == math.inf:
            allowed = "between 0 and 1" if highest == 1 else "finite and not negative"
            raise RowError(where, f"must be {allowed}, not {value}", column)
        return float(value)


class FileSource(TableSource):
    """Rows of a jsonl, jsonl.gz, parquet or csv file, or of a folder of them (in the order of their names).

    A row has ``chosen`` and ``rejected`` and, unless both are whole texts that begin alike, ``prompt``; each is text
    or a list of ``{"role", "content"}`` messages. ``preference`` (in [0, 1]) and ``weight`` (>= 0) are optional.

    Args:
        path: the file or folder.
        columns: see `TableSource`.
        on_bad_row: see `TableSource`.
    """

    reads_local_files: ClassVar[bool] = True

    def __init__(self, path: str, columns: Mapping[str, str] | None, on_bad_row: OnBadRow) -> None:
        super().__init__(on_bad_row, columns)
        self.path = Path(path).expanduser()

    @property
    def name(self) -> str:
        return str(self.path)

    def records(self) -> Iterator[tuple[str, Split | None, Record | RowError]]:
        for file in data_files(self.path):
            empty = True
            for where, record in read_records(file):
                empty = False
                yield where, None, record
            if empty:
                yield str(file), None, RowError(str(file), "the file holds no rows")


class HHSource(FileSource):
    r"""Anthropic's HH transcripts: ``chosen`` and ``rejected`` are dialogues that begin alike.

    The prompt reaches through the last ``\n\nAssistant:`` that both share; what follows is the completion. Dialogues
    with several turns stay one text.

    Args:
        path: a file or folder, as for `FileSource`.
        on_bad_row: see `TableSource`.
    """

    def __init__(self, path: str, on_bad_row: OnBadRow) -> None:
        super().__init__(path, None, on_bad_row)

    def parse(self, record: Record, where: str, split: Split | None) -> Row:
        """One dialogue pair as a row; a prompt column, if any, is ignored."""
        return super().parse({k: v for k, v in record.items() if k != "prompt"}, where, split)

    def split_prompt(self, chosen: Text, rejected: Text, where: str) -> tuple[Text, Text, Text]:
        if not (isinstance(chosen, str) and isinstance(rejected, str)):
            raise RowError(where, "a transcript must be one text; for lists of messages use data=jsonl", "chosen")
        cut = chosen[: _agreement(chosen, rejected)].rfind(_ASSISTANT)
        if cut < 0:
            raise RowError(where, f"chosen and rejected share no {_ASSISTANT!r} turn", "chosen")
        cut += len(_ASSISTANT)
        return chosen[:cut], chosen[cut:], rejected[cut:]


class RankedFileSource(FileSource):
    """Rows of ``prompt`` and ranked ``responses`` in a jsonl, jsonl.gz or parquet file, or a folder of them.

    Prompt and responses are text, or lists of messages. The ranking is ``order`` (positions in ``responses``, counted
    from 0, the best first) or, in a row without it, ``scores`` (one number per response, the higher the better).
    ``weight`` (>= 0) is optional.

    What says nothing about the ranking is left out of a list, and ``left_out`` counts it after `rows`: an empty
    response, one equal to a better one, and all but one of those with equal scores (which one is decided by the digest
    of its text, so that the order in the file never passes for a preference). A row with fewer than two left is
    skipped, counted and listed.

    Args:
        path: the file or folder.
        columns: see `TableSource`.
        on_bad_row: see `TableSource`.
        max_responses: most responses of a list, or ``None``. Which ones stay is decided by the digests of their texts
            and never by their rank: a part chosen by rank, such as the best few, would no longer be a ranking of the
            model of Plackett and Luce.

    Attributes:
        yields_lists: whether a row can hold more than two completions.
    """

    known = ("prompt", "responses", "scores", "order", "weight")

    def __init__(
        self,
        path: str,
        columns: Mapping[str, str] | None,
        on_bad_row: OnBadRow,
        max_responses: Annotated[int, Ge(2)] | None,
    ) -> None:
        super().__init__(path, columns, on_bad_row)
        if max_responses is not None and max_responses < 2:
            raise DataError(f"data.source.max_responses={max_responses}: a ranking needs at least 2")
        self.max_responses = max_responses
        self.yields_lists = max_responses is None or max_responses > 2
        self.left_out: Counter[str] = Counter()

    def rows(self, complete: Completer) -> list[Row]:
        """The rows that can be used, see `TableSource.rows`."""
        self.left_out.clear()
        return super().rows(complete)

    def parse(self, record: Record, where: str, split: Split | None) -> Row:
        """One record as a row.

        Raises:
            RowError: with the column and the reason.
        """
        prompt, column = self._text(record, "prompt", where), self.columns.get("responses", "responses")
        items = self._list(record, "responses", where)
        if len(items) < 2:
            raise RowError(where, f"a ranking needs at least 2 responses, not {len(items)}", column)
        responses = [_text(item, where, column, f"response {i}") for i, item in enumerate(items, 1)]
        if any(isinstance(response, str) != isinstance(prompt, str) for response in responses):
            raise RowError(where, "prompt and responses must all be text, or all lists of messages", column)
        kept, left_out = self._distinct(responses, self._ranked(record, responses, where))
        if len(kept) < 2:
            raise NoPreference(where, "fewer than 2 responses differ in text and rank and are not empty", column)
        among = sorted(kept)[: self.max_responses]
        chosen, rejected, *worse = (response for digest, response in kept.items() if digest in among)
        weight = self._number(record, "weight", where, math.inf)
        self.left_out += left_out
        return Row(prompt, chosen, rejected, weight=weight, split=split, where=where, worse=tuple(worse))

    def _ranked(self, record: Record, responses: Sequence[Text], where: str) -> list[list[int]]:
        """Positions in ``responses``, best first, those of one rank together."""
        size = len(responses)
        if "order" in self.columns or record.get("order") is not None:
            order, column = self._list(record, "order", where), self.columns.get("order", "order")
            if any(isinstance(i, bool) or not isinstance(i, int) for i in order) or sorted(order) != list(range(size)):
                raise RowError(where, f"must hold each of 0 to {size - 1} once, the best response's first", column)
            return [[i] for i in order]
        scores, column = self._list(record, "scores", where), self.columns.get("scores", "scores")
        if len(scores) != size:
            raise RowError(where, f"has {len(scores)} numbers for {size} responses", column)
        for i, score in enumerate(scores, 1):
            if isinstance(score, bool) or not isinstance(score, (int, float)):
                raise RowError(where, f"score {i} must be a number, not {_kind(score)}", column)
            if not math.isfinite(score):
                raise RowError(where, f"score {i} must be finite, not {score}", column)
        best_first = sorted(range(size), key=lambda i: -scores[i])
        return [list(tied) for _, tied in groupby(best_first, key=scores.__getitem__)]

    def _distinct(
        self, responses: Sequence[Text], ranked: Sequence[Sequence[int]]
    ) -> tuple[dict[str, Text], Counter[str]]:
        """The responses to learn from, best first, by the digests of their texts; and why others are not."""
        kept: dict[str, Text] = {}
        left_out: Counter[str] = Counter()
        for tied in ranked:
            taken = False
            for digest, response in sorted(((prompt_id(responses[i]), responses[i]) for i in tied), key=itemgetter(0)):
                if _is_empty(response) or digest in kept or taken:
                    left_out["empty" if _is_empty(response) else "equal" if digest in kept else "tied"] += 1
                else:
                    kept[digest], taken = response, True
        return kept, left_out

    def _list(self, record: Record, name: str, where: str) -> list[Any]:
        column = self.columns.get(name, name)
        if column not in record:
            raise RowError(where, f"missing; the row has {', '.join(map(str, record)) or 'no columns'}", column)
        value = record[column]
        if not isinstance(value, list):
            raise RowError(where, f"must be a list, not {_kind(value)}", column)
        return value


class HubSource(TableSource):
    """Rows of a data set on the Hugging Face hub, or of a local folder that ``datasets.load_dataset`` understands.

    Never runs code that comes with a data set.

    Args:
        path: the hub's name of the data set, or a folder.
        name: its configuration, or ``None``.
        revision: branch, tag or commit on the hub, or ``None``.
        split: the data set's split to read; or a mapping from ``train``, ``selection`` and ``test`` to the data set's
            split that feeds each (``None`` where it has none: those pairs are then taken out of ``train``, by prompt).
        columns: see `TableSource`.
        on_bad_row: see `TableSource`.
    """

    def __init__(
        self,
        path: str,
        name: str | None,
        revision: str | None,
        split: str | Mapping[Split, str | None],
        columns: Mapping[str, str] | None,
        on_bad_row: OnBadRow,
    ) -> None:
        super().__init__(on_bad_row, columns)
        self.path, self.config, self.revision = path, name, revision
        self.splits: dict[Split | None, str] = {}
        if isinstance(split, str):
            self.splits[None] = split
        else:
            if unknown := set(split) - {"train", "selection", "test"}:
                raise DataError(f"data.source.split: unknown {sorted(unknown)}; it names train, selection and test")
            self.splits.update({ours: theirs for ours, theirs in split.items() if theirs is not None})
            if "train" not in self.splits:
                raise DataError("data.source.split: name the data set's split that feeds train")

    @property
    def name(self) -> str:
        return self.path

    def records(self) -> Iterator[tuple[str, Split | None, Record | RowError]]:
        import datasets

        for ours, theirs in self.splits.items():
            try:
                table = datasets.load_dataset(self.path, self.config, split=theirs, revision=self.revision)
            except Exception as error:  # the hub client's errors share no base class
                raise DataError(
                    f"data.path={self.path}, split {theirs!r}: cannot be loaded ({type(error).__name__}: {error})"
                ) from error
            wanted = {self.columns.get(column, column) for column in COLUMNS}
            # Columns that are not ours may be images or audio, costly to decode.
            table = table.select_columns([column for column in table.column_names if column in wanted])
            for i, record in enumerate(table):
                yield f"{self.path}[{theirs}], row {i}", ours, record


def data_files(path: Path) -> list[Path]:
    """The data files that ``path`` stands for.

    Raises:
        DataError: when it does not exist, is a folder without data, or is of another kind.
    """
    if not path.exists():
        raise DataError(f"data.path={path}: no such file or folder (looked in {path.absolute().parent})")
    if path.is_dir():
        files = sorted(
            file for file in path.iterdir() if file.name.endswith(SUFFIXES) and not file.name.startswith(".")
        )
        if not files:
            raise DataError(f"data.path={path}: the folder holds no {', '.join(SUFFIXES)} file")
        return files
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"data.path={path}: not a {', '.join(SUFFIXES)} file")
    return [path]


def read_records(file: Path) -> Iterator[tuple[str, Record | RowError]]:
    """The records of one file, each with file and line; unreadable ones as the `RowError` that says why."""
    if file.suffix == ".parquet":
        return _parquet_records(file)
    return _csv_records(file) if file.suffix == ".csv" else _jsonl_records(file)


def shared_text(chosen: str, rejected: str) -> int:
    """Where two texts that begin alike may be cut without splitting a word; a space goes to the completions.

    Tokenizers merge a space into the word that follows it, so ``"The sky is" + " blue"`` is cut as written.
    """
    cut = _agreement(chosen, rejected)
    if chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace():
        return cut
    cut = min(cut, len(chosen) - 1, len(rejected) - 1)
    while cut > 0 and not chosen[cut - 1].isspace():
        cut -= 1
    return cut - 1 if cut > 0 and chosen[cut - 1] == " " else max(cut, 0)


def _agreement(first: str, second: str) -> int:
    """How many leading characters two texts share."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def shared_messages(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """How many leading messages two conversations share, leaving at least one to each."""
    cut = 0
    while cut < min(len(chosen), len(rejected)) - 1 and chosen[cut] == rejected[cut]:
        cut += 1
    return cut


def _jsonl_records(file: Path) -> Iterator[tuple[str, Record | RowError]]:
    for where, line in _lines(file):
        if isinstance(line, RowError):
            yield where, line
            continue
        try:
            text = line.decode("utf-8-sig")
            if not text.strip():
                continue
            record = json.loads(text)
        except UnicodeDecodeError as error:
            yield where, RowError(where, f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})")
        except (ValueError, RecursionError) as error:
            yield where, RowError(where, f"not valid JSON: {error}")
        else:
            if isinstance(record, dict):
                yield where, record
            else:
                yield where, RowError(where, f"must be a JSON object, not {_kind(record)}")


def _lines(file: Path) -> Iterator[tuple[str, bytes | RowError]]:
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield f"{file}, line {number}", line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        where = f"{file}, line {number + 1}"
        yield where, RowError(where, f"the gzip file is cut off or damaged here ({error}); what follows is lost")


def _csv_records(file: Path) -> Iterator[tuple[str, Record | RowError]]:
    # Undecodable bytes become lone surrogates, so that `_checked` finds them in the row that holds them.
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
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    row += 1
                    yield f"{file}, row {row}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"{file}, row {row + 1}"
        yield where, RowError(where, f"not a readable parquet file: {error}")


def _text(value: Any, where: str, column: str, name: str = "") -> Text:
    """Text or messages; ``name`` says which item of the column it is."""
    if isinstance(value, str):
        return _checked(value, where, column)
    if not isinstance(value, (list, tuple)):
        raise RowError(where, f"{name} must be text or a list of messages, not {_kind(value)}".strip(), column)
    return tuple(_message(item, i, where, column) for i, item in enumerate(value, 1))


def _checked(text: str, where: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(where, f"not UTF-8 at character {error.start + 1}", column) from None
    return text


def _message(item: Any, number: int, where: str, column: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(where, f"message {number} must be an object with role and content, not {_kind(item)}", column)
    for key in ("role", "content"):
        if not isinstance(item.get(key), str):
            raise RowError(where, f"message {number}: {key!r} must be text, not {_kind(item.get(key))}", column)
    return {key: _checked(item[key], where, column) for key in ("role", "content")}


def _is_empty(completion: Text) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message["content"].strip() for message in completion)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
