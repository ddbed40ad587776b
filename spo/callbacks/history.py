"""The history of a run: one JSON row per logged step, on the local disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from spo.notes import note
from spo.records.files import parse_jsonl, to_json, write_text

OF_TRAINING = ("train/", "time/")
"""Beginnings of the keys of metrics that do not come from a validation."""

_note = rank_zero_only(note)


class HistoryLogger(Logger):
    """Logger that appends to ``history.jsonl``; all metrics of a step share a row.

    Args:
        path: Path of the file.
        resume_at: Step of the checkpoint that a run resumes from, ``None`` for a run from its beginning. Rows up to
            this step stay. Later rows are dropped, since the resumed run logs their steps again.
        recorded: Text of the file when the checkpoint was written, which replaces rows that are missing; or ``None``.
        log_every_n_steps: Optimizer steps per row, by which missing rows are noticed without ``recorded``; or ``None``.

    Attributes:
        latest: Last value of each metric, including values from before a resume. A metric whose last value was not
            finite is absent.
        resumed: Rows from before the resume.
    """

    def __init__(
        self,
        path: Path,
        resume_at: int | None = None,
        recorded: str | None = None,
        log_every_n_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self._row: dict[str, Any] = {}
        self._written: dict[str, Any] = {}
        self._start = 0  # offset of the current row in the file
        self.latest: dict[str, float] = {}
        self.resumed: tuple[dict[str, Any], ...] = ()
        if path.exists() or resume_at is not None:
            rows = [] if resume_at is None else self._rows_until(resume_at, recorded, log_every_n_steps)
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

    def _rows(self) -> dict[int, dict[str, Any]]:
        return _rows_by_step(self.path.read_bytes().decode("utf-8", "replace") if self.path.exists() else "")

    def _rows_until(self, step: int, recorded: str | None, log_every_n_steps: int | None) -> list[dict[str, Any]]:
        """Return the rows of the file up to a step, repaired from the text that a checkpoint holds."""
        found, known = self._rows(), _rows_by_step(recorded or "")
        if missing := [one for one in known if one not in found and one <= step]:
            _note(
                "history_repaired",
                f"{self.path.name} lacked {len(missing)} rows up to step {step}: the checkpoint restored them",
                len(missing),
            )
        rows = {one: known.get(one, {}) | found.get(one, {}) for one in sorted(known.keys() | found.keys())}
        if recorded is None and log_every_n_steps is not None:
            expected = range(log_every_n_steps, step + 1, log_every_n_steps)
            if absent := [one for one in expected if one not in rows]:
                _note(
                    "history_rows_missing",
                    f"{self.path.name} lacks the rows of {len(absent)} steps between {absent[0]} and {absent[-1]}, "
                    "and the checkpoint does not hold them: the curves have a hole",
                    len(absent),
                )
        return [row for one, row in rows.items() if one <= step]

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
        """Add metrics to the row of their step; a number that is not finite becomes null.

        Monitors of Lightning count a step late. A step that is over does not get a second row, so their numbers join
        the current one.
        """
        if self._row and step is not None:
            step = max(step, self._row["step"])
        if self._row and self._row["step"] != step:
            self.save()
            self._start, self._row = self.path.stat().st_size, {}
        self._row = {"step": step, **self._row}
        values = {key: float(v) if math.isfinite(v) else None for key, v in metrics.items()}
        self._row |= values
        self._note(values)

    def latest_with_validation_of(self, step: int) -> dict[str, float]:
        """Return the last values of training metrics, and the values that the validation of a step logged.

        Args:
            step: Step of a validation, from which all metrics other than ``train/`` and ``time/`` come.
        """
        of_training = {key: value for key, value in self.latest.items() if key.startswith(OF_TRAINING)}
        row = self._rows().get(step, {})
        of_step = {key: value for key, value in row.items() if not key.startswith(OF_TRAINING) and key != "step"}
        return of_training | {key: value for key, value in of_step.items() if value is not None}

    def row(self, step: int) -> dict[str, Any]:
        """Return the metrics that were logged at a step, if it is the latest one that was logged."""
        return dict(self._row) if self._row.get("step") == step else {}

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

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows, those from before a resume included."""
        self.save()
        return list(self._rows().values())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last row, however training ended."""
        self.save()


def _rows_by_step(text: str) -> dict[int, dict[str, Any]]:
    """Return the readable rows by step. A process that was killed leaves half a last line."""
    rows = (row for _, row in parse_jsonl(text) if row is not None)
    return {row["step"]: row for row in rows if type(row.get("step")) is int}
