"""Preference pairs from data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from spo.bounds import OnBadRow
from spo.data.cells import without_nulls
from spo.data.readers import Record
from spo.data.rows import DataError, RowError, Split
from spo.data.tables import NOTED_COLUMNS, TableSource


class HubSource(TableSource):
    """Rows of a data set on the Hugging Face hub, or of a local folder that ``datasets.load_dataset`` reads.

    Code that comes with a data set is never run.

    Args:
        path: Name of the data set on the hub, or path of a folder.
        name: Named configuration of the data set; ``None`` for its default.
        revision: Branch, tag or commit on the hub; ``None`` for its default branch.
        split: Name of the data set's split to read, or a mapping from ``train``, ``selection`` and ``test`` to names of
            its splits. Where the mapping has ``None``, a share of the training prompts becomes that split.
        columns: Mapping from our column names to the data set's, see :class:`~spo.data.tables.TableSource`.
        on_bad_row: Policy for a malformed row, ``stop`` or ``skip``.
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
                raise DataError(f"data.source.split: unknown {sorted(unknown)}; choose from train, selection and test")
            self.splits.update({ours: theirs for ours, theirs in split.items() if theirs is not None})
            if "train" not in self.splits:
                raise DataError("data.source.split: set the data set's split to train on")

    @property
    def name(self) -> str:
        """Return the name on the hub, or the path of the folder."""
        return self.path

    def records(self) -> Iterator[tuple[str, Split | None, Record | RowError]]:
        """Yield the records of all splits that are read.

        Raises:
            DataError: If a split cannot be loaded.
        """
        import datasets

        for ours, theirs in self.splits.items():
            try:
                table = datasets.load_dataset(self.path, self.config, split=theirs, revision=self.revision)
            except Exception as error:  # The errors of the hub client do not share a base class.
                raise DataError(
                    f"data.path={self.path}, split {theirs!r}: cannot be loaded ({type(error).__name__}: {error})"
                ) from error
            media = {"image", "images"} & {*table.column_names}
            self.ignored.update(dict.fromkeys(media, len(table)))
            wanted = {*map(self.column_name, self.read_columns), *NOTED_COLUMNS}
            # Other columns may be images or audio, which are costly to decode.
            table = table.select_columns([name for name in table.column_names if name in wanted - media])
            for i, record in enumerate(table):
                row = {column: without_nulls(value) for column, value in record.items()}
                yield f"{self.path}[{theirs}], row {i}", ours, row
