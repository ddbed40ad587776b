"""``evaluation.policy=best``: the step is chosen on the selection split, by any metric of a validation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from spo.callbacks import Checkpoint
from spo.config.checks import code_problems, warnings
from spo.config.compose import compose
from spo.errors import UserError
from spo.records.files import read_jsonl
from tests.commands import TINY, history, job, shared_cache

# A rate that trains a while and then drifts, so that the best step is neither the first nor the last.
DRIFTING = [
    TINY,
    "method=dpo",
    "optimizer.lr=0.02",
    "scheduler=constant",
    "trainer.max_steps=10",
    "callbacks=best_win_rate",
    "evaluation.policy=best",
    "trainer.enable_progress_bar=false",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_cache(tmp_path_factory)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["callbacks.checkpoint.monitor=val/samples/win_rate"], "use callbacks=samples, or callbacks=best_win_rate"),
        (["callbacks=samples", "callbacks.checkpoint.monitor=eval/win_rate"], "the test split never chooses a step"),
        (["callbacks.checkpoint.monitor=val/win_rate"], "callbacks=best_win_rate measures val/samples/win_rate"),
        (["callbacks=best_win_rate", "judge=none"], "takes a judge, and there is none"),
    ],
)
def test_monitor_that_nothing_logs_is_rejected_before_a_model_is_loaded(
    overrides: list[str], words: str, tmp_path: Path
) -> None:
    [problem] = code_problems(compose(overrides, run_dir=tmp_path))
    assert problem.startswith("callbacks.checkpoint.monitor=") and words in problem


@pytest.mark.parametrize(
    "overrides",
    [
        ["callbacks=best_win_rate"],
        ["callbacks=best_win_rate", "callbacks.checkpoint.monitor=val/samples/kl", "judge=none"],
        ["callbacks.checkpoint.monitor=val/win_rate", "callbacks.checkpoint.top_k=0"],
        ["callbacks=none"],
    ],
)
def test_monitor_that_is_logged_or_not_used_is_accepted(overrides: list[str], tmp_path: Path) -> None:
    assert code_problems(compose(overrides, run_dir=tmp_path)) == []


@pytest.mark.parametrize(
    ("monitor", "mode", "expected"),
    [
        ("val/samples/win_rate", "min", "set callbacks.checkpoint.mode=max"),
        ("val/loss", "max", "set callbacks.checkpoint.mode=min"),
        ("val/samples/win_rate", "max", None),
        ("val/loss", "min", None),
        ("val/entropy", "min", None),
        ("val/entropy", "max", None),
    ],
)
def test_mode_that_keeps_the_worst_step_is_noted(monitor: str, mode: str, expected: str | None, tmp_path: Path) -> None:
    settings = ["callbacks=samples", f"callbacks.checkpoint.monitor={monitor}", f"callbacks.checkpoint.mode={mode}"]
    notes = [note for note in warnings(compose(settings, run_dir=tmp_path)) if "keeps the worst" in note]
    assert [note.endswith(expected) for note in notes] == [True] if expected else notes == []


def test_metric_that_a_judge_could_not_give_yet_is_not_rejected(tmp_path: Path) -> None:
    """Judges of a network may fail at the first validation; then no step has a value, and training continues."""
    monitor = "val/samples/win_rate"

    def value(unanswered: set[str]) -> float | None:
        trainer: Any = SimpleNamespace(
            callback_metrics={"val/loss": 1.0, "val/samples/reward": 2.0},
            callbacks=[SimpleNamespace(unanswered=unanswered), Callback()],
            is_global_zero=True,
            loggers=[],
            global_step=0,
            strategy=SimpleNamespace(broadcast=lambda found: found),
        )
        return Checkpoint(str(tmp_path), monitor, "max")._value(trainer)

    assert value({monitor}) is None
    with pytest.raises(UserError, match=r"choose one of val/loss, .*; did you mean val/samples/reward\?"):
        value(set())


class PowerCut(Callback):
    """Ends a run at a step, if there is one, as a crash would."""

    step: int | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the power is gone")


def of_validation(numbers: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in numbers.items() if key.startswith("val/samples/")}


@pytest.mark.slow
def test_best_step_has_the_highest_win_rate_and_survives_an_interruption(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = job(tmp_path / "whole", cache, *DRIFTING)
    rows = {row["step"]: row for row in history(tmp_path / "whole") if "val/samples/win_rate" in row and row["step"]}
    best = max(rows, key=lambda step: (rows[step]["val/samples/win_rate"], -step))
    assert metrics["policy/step"] == best < max(rows)
    assert of_validation(metrics) == of_validation(rows[best]) != of_validation(rows[max(rows)])
    assert "the best by val/samples/win_rate" in (tmp_path / "whole" / "report.html").read_text()
    cut = f"+callbacks.cut._target_={__name__}.PowerCut"
    for step in {best + 1, max(rows) - 1}:
        monkeypatch.setattr(PowerCut, "step", step)
        with pytest.raises(RuntimeError, match="power"):
            job(tmp_path / f"cut_{step}", cache, *DRIFTING, cut)
        monkeypatch.setattr(PowerCut, "step", None)
        assert job(tmp_path / f"cut_{step}", cache, *DRIFTING, cut) == metrics


@pytest.mark.slow
def test_test_prompts_do_not_choose_the_step(cache: Path, tmp_path: Path) -> None:
    metrics = job(tmp_path / "run", cache, *DRIFTING)
    seen = read_jsonl(tmp_path / "run" / "samples.validation.jsonl")
    tested = {row["prompt_id"] for row in read_jsonl(tmp_path / "run" / "samples.jsonl")}
    assert {row["split"] for row in seen} == {"selection"} and tested.isdisjoint(row["prompt_id"] for row in seen)
    # Other test prompts lead to the same step, weights and numbers of validation.
    other = job(tmp_path / "other", cache, *DRIFTING, "data.source.test_prompts=40", "evaluation.num_prompts=3")
    assert other["policy/step"] == metrics["policy/step"] and of_validation(other) == of_validation(metrics)
    weights = [(tmp_path / name / "policy/model.safetensors").read_bytes() for name in ("run", "other")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_misspelled_monitor_is_rejected_before_the_first_step(cache: Path, tmp_path: Path) -> None:
    settings = ["callbacks=samples", "callbacks.checkpoint.monitor=val/samples/win_rates"]
    with pytest.raises(
        UserError, match=r"val/samples/win_rates: .*choose one of .*; did you mean val/samples/win_rate\?"
    ):
        job(tmp_path / "run", cache, TINY, *settings)
    assert {row["step"] for row in history(tmp_path / "run")} == {0}
