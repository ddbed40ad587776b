"""The local record of a run's curves: one JSON row per logged step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from spo.records.files import parse_jsonl, write_text


class HistoryLogger(Logger):
    """Appends to ``history.jsonl``. What is logged at the same step, by whatever part, shares a row.

    Args:
        path: of the file.
        resume_at: step a run is resumed from, ``None`` for its beginning. Rows up to it stay, later ones were logged
            by the interrupted run after its last checkpoint and will be logged again.

    Attributes:
        latest: of each metric the value that was logged last, before a resume too; none where it was not finite.
        resumed: the rows that stayed.
    """

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        super().__init__()
        self.path = path
        self._row: dict[str, Any] = {}
        self._written: dict[str, Any] = {}
        self._start = 0  # where the row begins in the file
        self.latest: dict[str, float] = {}
        self.resumed: tuple[dict[str, Any], ...] = ()
        if path.exists():
            kept = [row for row in _readable_rows(path) if resume_at is not None and row["step"] <= resume_at]
            self.resumed = tuple(dict(row) for row in kept)
            for row in kept:
                self._note({key: value for key, value in row.items() if key != "step"})
            lines = [json.dumps(row) + "\n" for row in kept]
            write_text(path, "".join(lines))
            if kept and kept[-1]["step"] == resume_at:
                self._row, self._written = kept[-1], dict(kept[-1])
                lines.pop()
            self._start = sum(map(len, lines))  # json.dumps writes ASCII alone

    @property
    def name(self) -> str:
        """Of this kind of logger."""
        return "record"

    @property
    def version(self) -> str:
        """There is one record per run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration has a file of its own, ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds metrics to the row of their step; a number that is not finite becomes null."""
        if self._row and self._row["step"] != step:
            self.save()
            self._start, self._row = self.path.stat().st_size, {}
        self._row = {"step": step, **self._row}
        values = {key: float(v) if math.isfinite(v) else None for key, v in metrics.items()}
        self._row |= values
        self._note(values)

    def _note(self, values: dict[str, float | None]) -> None:
        for key, value in values.items():
            self.latest.pop(key, None)
            if value is not None:
                self.latest[key] = value

    @rank_zero_only
    def save(self) -> None:
        """Writes the row that is being collected, in the place of what was written of it before."""
        if self._row and self._row != self._written:
            self.path.touch()
            with self.path.open("r+") as file:
                file.truncate(self._start)
                file.seek(self._start)
                file.write(json.dumps(self._row) + "\n")
            self._written = dict(self._row)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes what is left, however training ended."""
        self.save()


def _readable_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for _, row in parse_jsonl(path.read_text(encoding="utf-8")):
        if row is None:  # A process that was killed leaves half a last line.
            break
        rows.append(row)
    return rows
