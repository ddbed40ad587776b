"""Prompts without completions, from a file."""

from __future__ import annotations

from collections.abc import Mapping

from spo.bounds import OnBadRow
from spo.data.files import FileSource
from spo.data.rendering import Renderer, prompt_id
from spo.data.rows import DataError, RowError
from spo.data.tables import TEMPLATE_COLUMNS
from spo.notes import note


class PromptFile(FileSource):
    """The column ``prompt`` of a jsonl, jsonl.gz, parquet or csv file, or of a folder of such files.

    A prompt is text or a list of messages, which may have ``tools`` and ``chat_template_kwargs``, as in
    :class:`~spo.data.files.FileSource`. Other columns are ignored.

    Args:
        path: Path of the file or folder.
        columns: Mapping from the names of the columns above to those in the file. Other names are ignored.
        on_bad_row: Policy for a malformed row, ``stop`` or ``skip``.
    """

    key = "regularizer.prompts"
    known = ("prompt", *TEMPLATE_COLUMNS)

    def __init__(self, path: str, columns: Mapping[str, str] | None, on_bad_row: OnBadRow) -> None:
        super().__init__(path, {key: name for key, name in (columns or {}).items() if key in self.known}, on_bad_row)

    def token_ids(self, renderer: Renderer) -> list[tuple[int, ...]]:
        """Return the tokens of each prompt once, in the order of their digests.

        Args:
            renderer: Conversion of the run between texts and tokens.

        Raises:
            RowError: A row is malformed, and ``on_bad_row`` is ``stop``.
            DataError: The file does not have a usable prompt.
        """
        found: dict[str, tuple[int, ...]] = {}
        bad: list[RowError] = []
        for where, _, record in self.records():
            try:
                if isinstance(record, RowError):
                    raise record
                prompt = self._text(record, "prompt", where)
                values = self._template_values(record, prompt, where)
                try:
                    found[prompt_id(prompt, *values.values())] = renderer.prompt_ids(prompt, **values)
                except RowError:
                    raise
                except DataError as error:
                    raise RowError(where, str(error), self.columns.get("prompt", "prompt")) from error
            except RowError as error:
                if self.on_bad_row == "stop":
                    raise
                bad.append(error)
        if not found:
            raise DataError(f"{self.name}: the file does not have a usable prompt" + (f"; {bad[0]}" if bad else ""))
        if bad:
            sentence = f"{len(bad)} rows do not have a usable prompt and were skipped, the first: {bad[0]}"
            note("bad_prompts", f"{self.name}: {sentence}", len(bad))
        return [found[key] for key in sorted(found)]
