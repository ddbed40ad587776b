"""The history of a run: one JSON row per logged step, on the local disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from spo.records.files import parse_jsonl, to_json, write_text


class HistoryLogger(Logger):
    """Logger that appends to ``history.jsonl``; all metrics of a step share a row.

    Args:
        path: Path of the file.
        resume_at: Step of the checkpoint that a run resumes from, ``None`` for a run from its beginning. Rows up to
            this step stay. Later rows are dropped, since the resumed run logs their steps again.

    Attributes:
        latest: Last value of each metric, including values from before a resume. A metric whose last value was not
            finite is absent.
        resumed: Rows from before the resume.
    """

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        super().__init__()
        self.path = path
        self._row: dict[str, Any] = {}
        self._written: dict[str, Any] = {}
        self._start = 0  # offset of the current row in the file
        self.latest: dict[str, float] = {}
        self.resumed: tuple[dict[str, Any], ...] = ()
        if path.exists():
            rows = [row for row in _readable_rows(path) if resume_at is not None and row["step"] <= resume_at]
            self.resumed = tuple(dict(row) for row in rows)
            for row in rows:
                self._note({key: value for key, value in row.items() if key != "step"})
            lines = [to_json(row) + "\n" for row in rows]
            write_text(path, "".join(lines))
            if rows and rows[-1]["step"] == resume_at:
                # The resumed run may log more metrics of this step, such as those of its validation.
                self._row, self._written = rows[-1], dict(rows[-1])
                lines.pop()
            self._start = sum(map(len, lines))  # json.dumps writes ASCII only, so characters are bytes

    @property
    def name(self) -> str:
        """Return the name that Lightning asks loggers for."""
        return "record"

    @property
    def version(self) -> str:
        """Return an empty version, since a run has one history."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of their step; a number that is not finite becomes null."""
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
        """Write the current row in place of its earlier version."""
        if self._row and self._row != self._written:
            self.path.touch()
            with self.path.open("r+") as file:
                file.truncate(self._start)
                file.seek(self._start)
                file.write(to_json(self._row) + "\n")
            self._written = dict(self._row)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last row, however training ended."""
        self.save()


def _readable_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for _, row in parse_jsonl(path.read_bytes().decode("utf-8", "replace")):
        # A process that was killed leaves half a last line.
        if row is None or isinstance(row.get("step"), bool) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows
