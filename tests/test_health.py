"""Alarms: their baselines, their messages, and a run that falls apart sets them off."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from spo.callbacks import Health
from spo.callbacks.health import CHECKS, TRAINED_ACCURACY
from spo.callbacks.history import HistoryLogger
from spo.forward.head import completion_logits
from spo.losses import DPOLoss
from spo.models import FrozenReference
from spo.module import AlignmentModule
from spo.pages.panels import result_panel
from spo.pages.run_page import render_report
from spo.watch import ProbeSettings
from tests.commands import history, job, shared_cache
from tests.helpers import (
    completion_logps,
    every_completion,
    make_data,
    make_module,
    make_trainer,
    random_pairs,
    tiny_llama,
)

START = {
    "logps_per_token/chosen": -1.0,
    "logps_per_token/rejected": -1.2,
    "p_eos": 0.8,
    "repetition": 0.05,
    "length": 40.0,
    "entropy": 1.0,
    "kl": 2.0,
    "rewards/accuracies": 0.65,
    TRAINED_ACCURACY: 0.7,
}
LIMITS: dict[str, Any] = {
    "chosen_fall": 1.0,
    "rejected_fall": 3.0,
    "p_eos": 0.5,
    "repetition": 0.3,
    "longer": 2.0,
    "shorter": 0.4,
    "entropy": 0.2,
    "kl": 15.0,
    "kl_per_token": 0.5,
    "overfitting": 0.3,
}
BEYOND = [
    ("chosen_fall", {"logps_per_token/chosen": -2.1}, 1.1),
    ("rejected_fall", {"logps_per_token/rejected": -4.3}, 3.1),
    ("p_eos", {"p_eos": 0.2}, 0.25),
    ("repetition", {"repetition": 0.31}, 0.31),
    ("longer", {"length": 100.0}, 2.5),
    ("shorter", {"length": 10.0}, 0.25),
    ("entropy", {"entropy": 0.1}, 0.1),
    ("kl", {"kl": 16.0}, 16.0),
    ("kl_per_token", {"kl": 12.0, "length": 20.0}, 0.6),
    ("overfitting", {TRAINED_ACCURACY: 1.0, "rewards/accuracies": 0.6}, 0.4),
]


class Logged:
    """Stands for a run's trainer: its step and what it was given to log."""

    def __init__(self) -> None:
        self.global_step, self.is_global_zero = 0, True
        self.rows: list[dict[str, float]] = []
        self.loggers = [SimpleNamespace(log_metrics=lambda row, step: self.rows.append({"step": step, **row}))]


def watched(folder: Path, *validations: dict[str, float], health: Health | None = None, **limits: Any) -> Logged:
    health = health or Health(str(folder / "health.json"), **LIMITS | limits)
    trainer, module = Logged(), make_module(tiny_llama())
    for step, numbers in enumerate(validations):
        trainer.global_step, module.validated = 10 * step, numbers
        health.on_validation_end(trainer, module)  # type: ignore[arg-type]
    return trainer


def test_every_limit_has_a_check_and_a_key() -> None:
    assert CHECKS.keys() == LIMITS.keys() == {check for check, _, _ in BEYOND}


@pytest.mark.parametrize(("check", "change", "value"), BEYOND)
def test_crossed_limit_warns_once(
    check: str, change: dict[str, float], value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ill = START | change
    logged = watched(tmp_path, START, ill, START, ill)
    assert [row["val/health/alarms"] for row in logged.rows] == [0, 1, 0, 1]
    [message] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith("step 10: ") and f"callbacks.health.{check}={LIMITS[check]:g}" in message
    [alarm] = json.loads((tmp_path / "health.json").read_text())
    assert (alarm["step"], alarm["check"], alarm["limit"]) == (10, check, LIMITS[check])
    assert alarm["value"] == pytest.approx(value)
    off = watched(tmp_path / "off", START, ill, **{check: None})
    assert [row["val/health/alarms"] for row in off.rows] == [0, 0]


def test_healthy_run_has_no_file_and_logs_drift(tmp_path: Path) -> None:
    later = START | {"logps_per_token/chosen": -1.3, "logps_per_token/rejected": -0.9}
    rows = watched(tmp_path, START, later).rows
    assert rows[0]["val/health/logp_drift_chosen"] == rows[0]["val/health/logp_drift_rejected"] == 0
    assert rows[1]["val/health/logp_drift_chosen"] == pytest.approx(-0.3)
    assert rows[1]["val/health/logp_drift_rejected"] == pytest.approx(0.3)
    assert rows[1]["val/health/accuracy_gap"] == pytest.approx(0.05)
    assert not (tmp_path / "health.json").exists()


def test_absent_metrics_are_not_checked(tmp_path: Path) -> None:
    rows = watched(tmp_path, {"logps_per_token/chosen": -1.0}, {"logps_per_token/chosen": -1.1}).rows
    assert rows[1].keys() == {"step", "val/health/logp_drift_chosen", "val/health/alarms"}


def test_nan_is_beyond_every_limit(tmp_path: Path) -> None:
    rows = watched(tmp_path, START, dict.fromkeys(START, float("nan"))).rows
    assert rows[1]["val/health/alarms"] == len(LIMITS)


def test_limits_of_the_kl_are_as_stated_at_their_edges(tmp_path: Path) -> None:
    """A limit is crossed above it, and not at it; nats per sequence and per token are separate limits."""
    at_limits = START | {"kl": 15.0, "length": 30.0}
    above = at_limits | {"kl": 15.01}
    logged = watched(tmp_path, START, at_limits, above)
    assert [row["val/health/alarms"] for row in logged.rows] == [0, 0, 2]
    (tmp_path / "long").mkdir()
    long = watched(tmp_path / "long", START, above | {"length": 60.0})
    assert [row["val/health/alarms"] for row in long.rows] == [0, 1]


class Rows(Callback):
    """Keeps the accuracy of each training row, and the gap that a mean of them gives at each validation."""

    def __init__(self) -> None:
        self.rows: list[float] = []
        self.gaps: dict[int, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.rows:
            self.gaps[trainer.global_step] = fmean(self.rows) - pl_module.validated["rewards/accuracies"]
        self.rows = []


def test_accuracy_gap_averages_the_training_rows_since_the_last_validation(tmp_path: Path) -> None:
    health = Health(str(tmp_path / "health.json"), **LIMITS | {"overfitting": None})
    module = make_module(
        tiny_llama(0, scale=0.1), loss=DPOLoss(), reference=FrozenReference(), reference_model=tiny_llama(0, scale=0.1)
    )
    rows = Rows()
    record = HistoryLogger(tmp_path / "history.jsonl")
    log = module._log

    def keep(row: dict[str, float]) -> None:
        rows.rows += [row[TRAINED_ACCURACY]] if TRAINED_ACCURACY in row else []
        log(row)

    module._log = keep  # type: ignore[method-assign]
    trainer = make_trainer(
        tmp_path, max_steps=7, callbacks=[health, rows], logger=record, val_check_interval=3, num_sanity_val_steps=-1
    )
    data = make_data(random_pairs(40, seed=0), random_pairs(16, seed=1), max_steps=7, batch_size=8)
    trainer.fit(module, datamodule=data)
    logged = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    found = {row["step"]: row["val/health/accuracy_gap"] for row in logged if "val/health/accuracy_gap" in row}
    assert found == pytest.approx(rows.gaps) and found.keys() == {3, 6} and all(found.values())
    state = health.state_dict()
    assert state["trained"] == [row[TRAINED_ACCURACY] for row in logged if row["step"] == 7]
    resumed = Health(str(tmp_path / "health.json"), **LIMITS)
    resumed.load_state_dict(state)
    assert resumed.trained == health.trained


def test_resumed_run_remembers_start_and_alarms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ill = START | {"entropy": 0.1}
    first = Health(str(tmp_path / "health.json"), **LIMITS)
    watched(tmp_path, START, ill, health=first)
    second = Health(str(tmp_path / "health.json"), **LIMITS)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    caplog.clear()
    logged = watched(tmp_path, ill, ill | {"length": 200.0}, health=second)
    assert [row["val/health/alarms"] for row in logged.rows] == [1, 2]
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert [alarm["check"] for alarm in json.loads((tmp_path / "health.json").read_text())] == ["entropy", "longer"]


def test_alarms_of_repeated_steps_leave_the_file(tmp_path: Path) -> None:
    path = tmp_path / "health.json"
    killed = Health(str(path), **LIMITS)
    states = []
    for validations in ([START], [START | {"entropy": 0.1}], [START | {"length": 200.0}]):
        watched(tmp_path, *validations, health=killed)
        states.append(json.loads(json.dumps(killed.state_dict())))
    assert len(json.loads(path.read_text())) == 2
    for state, expected in ((states[1], ["entropy"]), (states[0], None)):
        resumed = Health(str(path), **LIMITS)
        resumed.load_state_dict(state)
        resumed.on_train_start(Logged(), make_module(tiny_llama()))  # type: ignore[arg-type]
        kept = [alarm["check"] for alarm in json.loads(path.read_text())] if path.exists() else None
        assert kept == expected


def test_report_and_result_panel_show_alarms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched(tmp_path, START, START | {"p_eos": 0.001})
    (tmp_path / "history.jsonl").write_text('{"step": 0, "val/loss": 1.0}\n')
    words = "the probability of ending where a chosen completion ends is"
    assert words in render_report(tmp_path).read_text()
    result_panel({}, [], tmp_path)
    assert words in " ".join(capsys.readouterr().out.replace("│", " ").split())
    (tmp_path / "health.json").write_text("{broken")
    assert words not in render_report(tmp_path).read_text()


def collapse(folder: Path, lr: float) -> tuple[list[dict[str, Any]], AlignmentModule, Trainer]:
    module = make_module(
        tiny_llama(0, scale=0.1),
        loss=DPOLoss(),
        reference=FrozenReference(),
        reference_model=tiny_llama(0, scale=0.1),
        probe=ProbeSettings(8, 16),
        lr=lr,
    )
    pairs = random_pairs(16, seed=0)
    data = make_data(pairs, pairs, max_steps=6)
    folder.mkdir()
    record = HistoryLogger(folder / "history.jsonl")
    health = Health(str(folder / "health.json"), **LIMITS)
    trainer = make_trainer(
        folder, max_steps=6, callbacks=[health], logger=record, val_check_interval=2, num_sanity_val_steps=-1
    )
    trainer.fit(module, datamodule=data)
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()], module, trainer


def test_violent_training_trips_alarm_and_gentle_does_not(tmp_path: Path) -> None:
    rows, _, _ = collapse(tmp_path / "gentle", 0.01)
    validations = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in validations] == [0, 2, 4, 6]
    assert all(row["val/health/alarms"] == 0 for row in validations)
    first, last = validations[0], validations[-1]
    drift = last["val/logps_per_token/chosen"] - first["val/logps_per_token/chosen"]
    assert last["val/health/logp_drift_chosen"] == pytest.approx(drift) != 0
    rows, _, _ = collapse(tmp_path / "violent", 30.0)
    assert rows[-1]["val/health/alarms"] > 0 and (tmp_path / "violent" / "health.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spo", "dpo"])
def test_planted_collapse_of_default_run_trips_alarm(
    method: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Defaults but for the length: the stories, the shipped limits, and a learning rate a hundred times too large."""
    settings = [f"method={method}", "trainer.max_steps=50", "trainer.val_check_interval=25", "sft.max_steps=200"]
    few = ["evaluation.num_prompts=8", "evaluation.selection_prompts=0", "evaluation.bootstrap_samples=50"]
    cache = shared_cache(tmp_path_factory)
    for name, lr, expected in (("healthy", "0.001", False), ("collapsed", "0.1", True)):
        metrics = job(
            tmp_path / name, cache, *settings, *few, f"optimizer.lr={lr}", "trainer.enable_progress_bar=false"
        )
        alarms = [row["val/health/alarms"] for row in history(tmp_path / name) if "val/health/alarms" in row]
        assert alarms[0] == 0 and (alarms[-1] > 0) == expected == (metrics["val/health/alarms"] > 0)
        assert (tmp_path / name / "health.json").is_file() == expected
        assert ("have lost" in (tmp_path / name / "report.html").read_text()) == expected


@pytest.mark.slow
def test_planted_overtraining_trips_the_alarms_of_overfitting_and_kl(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped limits: few pairs with sampled labels, seen many times at a high rate."""
    few = ["evaluation.num_prompts=8", "evaluation.selection_prompts=0", "evaluation.bootstrap_samples=50"]
    settings = ["method=dpo", "sft.max_steps=200", "optimizer.lr=0.003", "trainer.max_steps=50"]
    settings += ["trainer.val_check_interval=25", "data.source.labels=hard", "data.limit=64", "data.min_pairs=16"]
    run = tmp_path / "run"
    metrics = job(run, shared_cache(tmp_path_factory), *settings, *few, "trainer.enable_progress_bar=false")
    alarms = {alarm["check"]: alarm for alarm in json.loads((run / "health.json").read_text())}
    assert alarms["overfitting"]["value"] > 0.3 == alarms["overfitting"]["limit"] and "kl_per_token" in alarms
    last = [row for row in history(run) if "val/health/alarms" in row][-1]
    assert (
        last["val/health/alarms"] >= 2 and metrics["val/health/accuracy_gap"] == last["val/health/accuracy_gap"] > 0.3
    )
    words = "the implicit reward orders a share of pairs in training that is"
    assert words in (run / "report.html").read_text()
    assert words in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_probe_agrees_with_enumeration() -> None:
    """KL and entropy of 2000 fresh samples, within four standard errors of the sums over all 64 completions."""
    tiny = {"vocab_size": 4, "eos_token_id": None, "pad_token_id": None, "bos_token_id": None}
    policy, reference = (tiny_llama(seed, scale=0.3, **tiny) for seed in (0, 1))
    module = make_module(
        policy,
        reference=FrozenReference(),
        reference_model=reference,
        prompts=[[1]],
        stop_ids=(99,),
        probe=ProbeSettings(num_prompts=2000, max_new_tokens=3),
    )
    module.trainer = Trainer(logger=False, enable_checkpointing=False)
    measured = module.probe.measure([[1]], "test")
    every = every_completion([1], 4, 3)
    with torch.no_grad():
        p, q = (completion_logits(model, every).log_softmax(-1).view(64, 3, 4) for model in (policy, reference))
        probability = completion_logps(policy, every).exp()
    along = {"kl": (p.exp() * (p - q)).sum((1, 2)), "entropy": -(p.exp() * p).sum((1, 2)) / 3}
    for name, values in along.items():
        mean = probability @ values
        error = ((probability @ (values - mean) ** 2) / 2000).sqrt()
        assert measured[name] == pytest.approx(float(mean), abs=4 * float(error)), name
