"""Single completions with labels from files: TRL's format of unpaired preferences."""

from __future__ import annotations

import math

from spo.data.cells import number_cell
from spo.data.files import FileSource
from spo.data.messages import is_empty
from spo.data.prompts import separate_prompt
from spo.data.readers import Record
from spo.data.rows import Row, Split
from spo.data.tables import TEMPLATE_COLUMNS, NoPreference


class LabelledFileSource(FileSource):
    """Rows of ``prompt``, ``completion`` and ``label`` in a jsonl, jsonl.gz, parquet or csv file, or a folder of such.

    Prompt and completion are text, or lists of messages. ``label`` is true for a desirable completion and false for
    another one, or the probability in [0, 1] that it is desirable. ``weight`` (>= 0) is optional. So are ``tools`` and
    ``chat_template_kwargs`` of conversations.

    Args:
        path: Path of the file or folder.
        columns: Mapping from our column names to the file's, see :class:`~spo.data.tables.TableSource`.
        on_bad_row: Policy for a malformed row, ``stop`` or ``skip``.
    """

    known = ("prompt", "completion", "label", "weight", *TEMPLATE_COLUMNS)
    yields_labels = True

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """Return the names of the columns with numbers that the loss declares, one for each completion."""
        return self.needs.label_number_columns

    def parse(self, record: Record, where: str, split: Split | None) -> Row:
        """Convert a record to a row.

        Args:
            record: Values by column name.
            where: Place of the record for messages, such as file and line.
            split: Split that the source assigns to the record, or ``None``.

        Raises:
            RowError: If the record is malformed, with the column and the reason.
            NoPreference: If the completion is empty.
        """
        candidate = self._candidate(record, "completion", where)
        given = self._text(record, "prompt", where)
        prompt, [completion] = separate_prompt(given, [candidate], self.column_name("prompt"), where, self.findings)
        self._count_turns(prompt, [completion], where)
        if is_empty(completion):
            raise NoPreference(where, "the completion is empty", candidate.column)
        column, label = self._required(record, "label", where)
        label = float(label) if isinstance(label, bool) else number_cell(label, where, column, 0.0, 1.0)
        values = self._template_values(record, prompt, where)
        values["columns"] = self._declared_columns(record, prompt, where)
        weight = self._number(record, "weight", where, math.inf)
        return Row(prompt, completion, weight=weight, split=split, where=where, label=label, **values)
