"""Preference pairs from files: TRL's formats and HH transcripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from spo.bounds import OnBadRow
from spo.data.cells import common_prefix_length
from spo.data.readers import Record, data_files, read_records
from spo.data.rows import Row, RowError, Split, Text
from spo.data.tables import TableSource

_ASSISTANT = "\n\nAssistant:"


class FileSource(TableSource):
    """Rows of a jsonl, jsonl.gz, parquet or csv file, or of a folder of them (in the order of their names).

    A row has ``chosen`` and ``rejected`` and, unless both are whole texts that begin alike, ``prompt``; each is text
    or a list of ``{"role", "content"}`` messages. ``preference`` (in [0, 1]) and ``weight`` (>= 0) are optional.

    Args:
        path: the file or folder.
        columns: see `TableSource`.
        on_bad_row: see `TableSource`.
    """

    reads_local_files = True

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
        cut = chosen[: common_prefix_length(chosen, rejected)].rfind(_ASSISTANT)
        if cut < 0:
            raise RowError(where, f"chosen and rejected share no {_ASSISTANT!r} turn", "chosen")
        cut += len(_ASSISTANT)
        return chosen[:cut], chosen[cut:], rejected[cut:]
