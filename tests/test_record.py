"""The local record: one row per step, also over an interruption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from spo.callbacks.history import HistoryLogger


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


def test_metrics_of_a_step_share_a_row(path: Path) -> None:
    record = HistoryLogger(path)
    record.log_metrics({"train/loss": 1.0}, step=1)
    record.log_metrics({"train/loss": 0.5, "lr": 0.1}, step=2)
    record.log_metrics({"val/loss": 0.7}, step=2)
    record.finalize("success")
    record.finalize("success")
    assert rows(path) == [
        {"step": 1, "train/loss": 1.0},
        {"step": 2, "train/loss": 0.5, "lr": 0.1, "val/loss": 0.7},
    ]


def test_row_written_when_next_step_begins(path: Path) -> None:
    record = HistoryLogger(path)
    record.log_metrics({"a": 1.0}, step=1)
    record.log_metrics({"a": 2.0}, step=2)
    assert rows(path) == [{"step": 1, "a": 1.0}]


def test_non_finite_numbers_become_null(path: Path) -> None:
    record = HistoryLogger(path)
    record.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0}, step=1)
    record.save()
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    assert rows(path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.0}]


def test_resume_drops_later_rows_and_keeps_each_step_once(path: Path) -> None:
    path.write_text("".join(json.dumps({"step": step, "a": float(step)}) + "\n" for step in (2, 4, 6)))
    record = HistoryLogger(path, resume_at=4)
    record.log_metrics({"b": 1.0}, step=4)  # such as the validation of the step that was resumed from
    record.log_metrics({"a": 60.0}, step=6)
    record.finalize("success")
    assert rows(path) == [{"step": 2, "a": 2.0}, {"step": 4, "a": 4.0, "b": 1.0}, {"step": 6, "a": 60.0}]


def test_resume_between_two_rows(path: Path) -> None:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)))
    HistoryLogger(path, resume_at=5).finalize("success")
    assert rows(path) == [{"step": 2}, {"step": 4}]


def test_truncated_last_line_is_dropped(path: Path) -> None:
    path.write_text('{"step": 2, "a": 1.0}\n{"step": 4, "a": 2.0}\n{"step": 6, "a')
    HistoryLogger(path, resume_at=6).finalize("success")
    assert rows(path) == [{"step": 2, "a": 1.0}, {"step": 4, "a": 2.0}]


def test_file_without_final_newline_continues_on_new_line(path: Path) -> None:
    path.write_text('{"step": 2}\n{"step": 4}')
    record = HistoryLogger(path, resume_at=4)
    record.log_metrics({"a": 1.0}, step=6)
    record.finalize("success")
    assert rows(path) == [{"step": 2}, {"step": 4}, {"step": 6, "a": 1.0}]


def test_resume_without_a_file_starts_one(path: Path) -> None:
    record = HistoryLogger(path, resume_at=4)
    record.log_metrics({"a": 1.0}, step=5)
    record.finalize("success")
    assert rows(path) == [{"step": 5, "a": 1.0}]


def test_restarted_run_drops_all_rows(path: Path) -> None:
    path.write_text('{"step": 0, "a": 0.0}\n{"step": 2, "a": 2.0}\n{"ste')  # killed before its first checkpoint
    record = HistoryLogger(path, resume_at=None)
    record.log_metrics({"a": 1.0}, step=0)
    record.finalize("success")
    assert rows(path) == [{"step": 0, "a": 1.0}] and record.latest == {"a": 1.0} and record.resumed == ()


def test_kept_rows_are_available(path: Path) -> None:
    path.write_text("".join(json.dumps({"step": step, "a": float(step)}) + "\n" for step in (2, 4, 6)))
    record = HistoryLogger(path, resume_at=4)
    record.log_metrics({"b": 1.0}, step=4)
    assert record.resumed == ({"step": 2, "a": 2.0}, {"step": 4, "a": 4.0})


def test_row_is_saved_before_checkpoint_and_grows_in_place(path: Path) -> None:
    record = HistoryLogger(path)
    record.log_metrics({"a": 1.0}, step=1)
    record.save()
    assert rows(path) == [{"step": 1, "a": 1.0}]
    record.log_metrics({"b": 2.0}, step=1)
    record.log_metrics({"a": 3.0}, step=2)
    record.save()
    expected = [{"step": 1, "a": 1.0, "b": 2.0}, {"step": 2, "a": 3.0}]
    assert rows(path) == expected
    again = HistoryLogger(path, resume_at=2)  # and is killed at once, before it logs anything
    assert rows(path) == expected
    again.log_metrics({"c": 4.0}, step=2)
    again.log_metrics({"a": 5.0}, step=3)
    again.finalize("success")
    expected = [expected[0], {"step": 2, "a": 3.0, "c": 4.0}, {"step": 3, "a": 5.0}]
    assert rows(path) == expected
