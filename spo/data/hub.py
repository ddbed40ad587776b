"""Preference pairs from data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from spo.bounds import OnBadRow
from spo.data.readers import Record
from spo.data.rows import DataError, RowError, Split
from spo.data.tables import COLUMNS, TableSource


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
