"""Preference pairs from files: TRL's formats and HH transcripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from spo.bounds import OnBadRow
from spo.data.prompts import Candidate, common_prefix_length
from spo.data.readers import Record, data_files, read_records
from spo.data.rows import Row, RowError, Split, Text
from spo.data.tables import TableSource

_ASSISTANT, _HUMAN = "\n\nAssistant:", "\n\nHuman:"


class FileSource(TableSource):
    """Rows of a jsonl, jsonl.gz, parquet or csv file, or of a folder of such files in alphabetical order.

    A row has ``chosen``, ``rejected`` and ``prompt``. Each is text or a list of ``{"role", "content"}`` messages.
    Without ``prompt``, the beginning that chosen and rejected share becomes the prompt. ``preference`` (in [0, 1]) and
    ``weight`` (>= 0) are optional. So are ``tools`` and ``chat_template_kwargs`` of conversations. ``rejected`` is
    optional for a method that does not read it.

    Args:
        path: Path of the file or folder.
        columns: Mapping from our column names to the file's, see :class:`TableSource`.
        on_bad_row: Policy for a malformed row, ``stop`` or ``skip``.

    Attributes:
        key: Key of the configuration that names the file, for messages.
    """

    reads_local_files = True
    key: ClassVar[str] = "data.path"

    def __init__(self, path: str, columns: Mapping[str, str] | None, on_bad_row: OnBadRow) -> None:
        super().__init__(on_bad_row, columns)
        self.path = Path(path).expanduser()

    @property
    def name(self) -> str:
        """Return the path."""
        return str(self.path)

    def records(self) -> Iterator[tuple[str, Split | None, Record | RowError]]:
        """Yield the records of all files, and an error for an empty file; files do not assign splits."""
        for file in data_files(self.path, self.key):
            empty = True
            for where, record in read_records(file, self.findings, self.number_columns):
                empty = False
                yield where, None, record
            if empty:
                yield str(file), None, RowError(str(file), "the file does not contain a row")


class HHSource(FileSource):
    r"""Anthropic's HH transcripts: ``chosen`` and ``rejected`` are dialogues with the same beginning.

    The prompt ends after the last ``\n\nAssistant:`` that both share, and the completion is the rest. Dialogues with
    several turns stay one text.

    Args:
        path: Path of a file or folder, as for :class:`FileSource`.
        on_bad_row: Policy for a malformed row, ``stop`` or ``skip``.
    """

    def __init__(self, path: str, on_bad_row: OnBadRow) -> None:
        super().__init__(path, None, on_bad_row)

    def parse(self, record: Record, where: str, split: Split | None) -> Row:
        """Convert a pair of dialogues to a row and ignore a ``prompt`` column, since the dialogues contain it."""
        return super().parse({k: v for k, v in record.items() if k != "prompt"}, where, split)

    def split_prompt(self, chosen: Candidate, rejected: Candidate | None, where: str) -> tuple[Text, list[Text]]:
        """Split the dialogues after the last turn marker of the assistant that both share."""
        second = rejected or chosen
        better, worse = chosen.text, second.text
        if not (isinstance(better, str) and isinstance(worse, str)):
            raise RowError(where, "a transcript must be one text; for lists of messages use data=jsonl", "chosen")
        # The last marker, since both dialogues may share several turns before they differ.
        cut = better[: common_prefix_length(better, worse)].rfind(_ASSISTANT)
        if cut < 0:
            raise RowError(where, f"chosen and rejected do not share a {_ASSISTANT!r} turn", "chosen")
        cut += len(_ASSISTANT)
        for dialogue, column in ((better, chosen.column), (worse, second.column)):
            if dialogue.rfind(_HUMAN) > dialogue.rfind(_ASSISTANT):
                raise RowError(where, "ends with a turn of the human; the last turn must be the assistant's", column)
        if _HUMAN in better[cut:] + worse[cut:]:
            self.findings.add("other_turns", where)
        return better[:cut], [better[cut:]] if rejected is None else [better[cut:], worse[cut:]]
