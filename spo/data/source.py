"""The base class of every data source, with what a source declares about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any

from spo.data.findings import Findings
from spo.data.rows import Completer, Row, RowError, Split, Writer

if TYPE_CHECKING:
    from spo.data.enumerable import Language
    from spo.losses import DataNeeds


class Source(ABC):
    """A source of preference rows.

    Subclasses set the attributes that differ from the values below, in the class or in the constructor.

    Attributes:
        samples_rows: Whether :meth:`rows` samples completions from a model, so that its result is cached.
        writer: Folder of the model that writes sampled completions; ``None`` for the reference model.
        temperature: Temperature at which the model writes them.
        further_writers: Further models that write completions, which it passes to the completer itself.
        needs_judge: Whether :meth:`rows` asks a judge, which the stages set.
        judge: Judge of completions (:class:`spo.evaluation.judges.Judge`), ``None`` until the stages set it.
        sft_reads: Arguments of the constructor on which :meth:`sft_rows` depends, so that others leave the cached
            reference model valid; ``None`` for all. Only the class itself can declare them: a subclass may read more.
        yields_lists: Whether a row can have more than two completions.
        yields_labels: Whether each row is a single completion with a label.
        has_columns: Whether rows can have the columns that a loss declares, in ``Row.columns``.
        provided_columns: Columns that the source computes itself, for a loss that declares them.
        reads_local_files: Whether ``data.path`` must exist on this machine.
        language: Prompts and responses of data that can be enumerated; ``None`` for other data.
        bad_rows: Rows that the last call of :meth:`rows` skipped, with the reasons.
        dropped_pairs: Number of pairs that the last call of :meth:`rows` dropped, by reason.
        dropped_responses: Number of responses that the last call of :meth:`rows` dropped from lists, by reason.
        findings: Peculiarities of the rows that the last call of :meth:`rows` read.
    """

    samples_rows: bool = False
    writer: str | None = None
    temperature: float = 1.0
    further_writers: tuple[Writer, ...] = ()
    needs_judge: bool = False
    judge: Any = None
    sft_reads: tuple[str, ...] | None = None
    yields_lists: bool = False
    yields_labels: bool = False
    has_columns: bool = False
    provided_columns: tuple[str, ...] = ()
    reads_local_files: bool = False
    language: Language | None = None
    _needs: DataNeeds | None = None

    def __init__(self) -> None:
        self.bad_rows: list[RowError] = []
        self.dropped_pairs: Counter[str] = Counter()
        self.dropped_responses: Counter[str] = Counter()
        self.findings = Findings()

    @property
    def needs(self) -> DataNeeds:
        """Return what the loss asks of the data; the stages set it before they call :meth:`rows`."""
        if self._needs is None:
            from spo.losses import DataNeeds  # Imports torch, which a reader of files does not need.

            self._needs = DataNeeds()
        return self._needs

    @needs.setter
    def needs(self, needs: DataNeeds) -> None:
        self._needs = needs

    def column_name(self, name: str) -> str:
        """Return the data's own name of a column, for messages."""
        return name

    def check_columns(self) -> None:  # noqa: B027, most data does not have names of its own
        """Check the names that the configuration gives to columns.

        Raises:
            DataError: If a name is not that of a column that is read.
        """

    def check_limits(self, max_length: int, truncation: str) -> None:  # noqa: B027, most data takes any limits
        """Check that the length limit suits the data.

        Args:
            max_length: Largest number of tokens of prompt and completion together (``data.max_length``).
            truncation: Policy for longer pairs (``data.truncation``).

        Raises:
            DataError: If the data cannot be used with these values.
        """

    def prompts(self, split: Split) -> list[str] | None:
        """Return the prompts of a split if the source knows them without its rows, else ``None``.

        Evaluation then covers all of them, even those without a usable row.
        """
        return None

    def unlabeled_prompts(self) -> list[str]:
        """Return further prompts to train on, which do not have a pair and are not in a split."""
        return []

    def sft_rows(self) -> list[Row] | None:
        """Return rows to fine-tune the reference model on; ``None`` means the chosen completions of :meth:`rows`."""
        return None

    @abstractmethod
    def rows(self, complete: Completer) -> list[Row]:
        """Return the preference rows.

        Args:
            complete: Function that samples completions from a model, for a source without completions.

        Raises:
            DataError: If the source does not yield a usable row.
        """
