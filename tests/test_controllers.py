"""Controllers of alpha and beta: the rule on plants in closed form, and the real command."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from spo import cli
from spo.callbacks import Checkpoint
from spo.callbacks.history import HistoryLogger
from spo.config.checks import problems, warnings
from spo.config.compose import compose
from spo.config.plan import plan
from spo.errors import ConfigProblems
from spo.models import FrozenReference
from spo.module import AlignmentModule
from spo.schedules import Controller, TargetEntropy, TargetKL
from spo.watch import Probe, ProbeSettings
from tests.commands import TINY, enter, history, job, numbers, rows, shared_cache
from tests.helpers import make_data, make_module, make_trainer, random_pairs, tiny_llama

KINDS = [TargetEntropy, TargetKL]


def make(kind: type[Controller], target: float, start: float = 1.0, **changes: Any) -> Controller:
    settings: dict[str, Any] = {"rate": 0.1, "gain": 0.0, "every": 1, "min": 1e-3, "max": 1e3}
    return kind(target, start, **settings | changes)


# --- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "measured", "log_factor"),
    [
        (TargetEntropy, 2.0, 0.0),
        (TargetEntropy, 1.0, 0.05),  # half the target is missing: softer
        (TargetEntropy, 0.0, 0.1),
        (TargetEntropy, 3.0, -0.05),
        (TargetEntropy, 50.0, -0.1),  # never more than the rate
        (TargetKL, 2.0, 0.0),
        (TargetKL, 0.0, -0.1),  # the policy has not moved: let go
        (TargetKL, 3.0, 0.05),
        (TargetKL, 50.0, 0.1),
    ],
)
def test_one_measurement_changes_coefficient_by_rule(
    kind: type[Controller], measured: float, log_factor: float
) -> None:
    controller = make(kind, target=2.0, start=0.3)
    controller.observe(measured)
    assert controller(0) == controller(10**6) == pytest.approx(0.3 * math.exp(log_factor), rel=1e-14)
    assert not controller.saturated


def test_gain_adds_current_error_to_ascent() -> None:
    controller = make(TargetKL, target=2.0, start=0.3, gain=0.7)
    controller.observe(3.0)
    assert controller(0) == pytest.approx(0.3 * math.exp(0.05 + 0.35), rel=1e-14)
    controller.observe(2.0)  # at the target, what was ascended stays and the rest is gone
    assert controller(0) == pytest.approx(0.3 * math.exp(0.05), rel=1e-14)


def test_gain_damps_oscillation() -> None:
    """On a policy that follows slowly, dual ascent alone overshoots; the gain takes the swing out of it."""

    def swing(gain: float) -> float:
        controller, measured, seen = make(TargetEntropy, 0.3, 30.0, rate=0.5, gain=gain), entropy_at(30.0), []
        for step in range(400):
            measured = 0.95 * measured + 0.05 * entropy_at(controller(step))
            controller.observe(measured)
            seen.append(abs(measured - 0.3))
        return max(seen[100:])

    assert swing(gain=2.0) < 0.3 * swing(gain=0.0)


# A softmax over two responses whose rewards differ by one, at temperature alpha: softer as alpha grows.
def entropy_at(alpha: float) -> float:
    p = 1 / (1 + math.exp(-1 / alpha))
    return -p * math.log(p) - (1 - p) * math.log1p(-p) if p < 1 else 0.0


def kl_at(beta: float) -> float:
    """Return the KL of softmax(r / beta) to the uniform reference."""
    return math.log(2) - entropy_at(beta)


@pytest.mark.parametrize("lag", [0.0, 0.9])
@pytest.mark.parametrize("start", [0.01, 30.0])
@pytest.mark.parametrize(("kind", "plant"), [(TargetEntropy, entropy_at), (TargetKL, kl_at)])
def test_controller_brings_plant_to_target(
    kind: type[Controller], plant: Callable[[float], float], start: float, lag: float
) -> None:
    """Also where the policy follows its coefficient with a delay, and from either side."""
    for target in (0.1, 0.3, 0.6):
        controller, measured = make(kind, target, start), plant(start)
        for step in range(2000):
            measured = lag * measured + (1 - lag) * plant(controller(step))
            controller.observe(measured)
        assert plant(controller(0)) == pytest.approx(target, rel=1e-3)
        assert not controller.saturated


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_and_are_left_again(kind: type[Controller]) -> None:
    controller = make(kind, target=1.0, min=0.9, max=1.05)
    low, high = (0.0, 9.0) if kind is TargetKL else (9.0, 0.0)
    controller.observe(high)
    assert controller(0) == 1.05 and controller.saturated
    controller.observe(1.0)
    assert controller(0) == 1.05 and not controller.saturated  # nothing pushes against the bound any more
    for _ in range(3):
        controller.observe(low)
    assert controller(0) == 0.9 and controller.saturated
    controller.observe(high)
    assert 0.9 < controller(0) < 1.0 and not controller.saturated


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_checkpoint(kind: type[Controller], tmp_path: Path) -> None:
    one = make(kind, target=0.7, max=1.02)
    for measured in (0.3, 0.9, 1.7, 0.11):
        one.observe(measured)
    torch.save(one.state_dict(), tmp_path / "state")
    other = make(kind, target=0.7, max=1.02)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for measured in (1.3, 0.2, 0.4):
        assert (other(0), other.saturated) == (one(0), one.saturated)
        one.observe(measured)
        other.observe(measured)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["target", "start", "rate", "every", "min", "max"])
def test_invalid_numbers_raise(kind: type[Controller], name: str) -> None:
    for bad in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be a positive, finite number"):
            make(kind, **{"target": 1.0, name: bad})
    with pytest.raises(ValueError, match="gain must be a finite number >= 0, got -1"):
        make(kind, target=1.0, gain=-1)
    with pytest.raises(ValueError, match="start=1 must lie between the bounds min=2 and max=1000"):
        make(kind, target=1.0, min=2.0)


# --- in the alignment step -----------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class Interrupt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise Interrupted


def aligned(
    folder: Path,
    *,
    alpha: Controller | None = None,
    beta: Controller | None = None,
    stop_at: int | None = None,
    resume_at: int | None = None,
    log_every: int = 4,
) -> AlignmentModule:
    """Twelve steps of a tiny model under controllers, validated and saved every three."""
    folder.mkdir(exist_ok=True)
    policy, reference = (tiny_llama(seed, scale=0.1, dtype=torch.float32) for seed in (0, 1))
    module = make_module(
        policy,
        regularizer=None,
        reference=FrozenReference(),
        reference_model=reference,
        probe=ProbeSettings(num_prompts=3, max_new_tokens=4),
        optimizer=torch.optim.AdamW,
        log_every_n_steps=log_every,
        **{name: schedule for name, schedule in (("alpha", alpha), ("beta", beta)) if schedule is not None},
    )
    trainer = make_trainer(
        folder,
        max_steps=12,
        enable_checkpointing=True,
        callbacks=[
            Checkpoint(str(folder / "checkpoints"), "val/loss", "min"),
            *([] if stop_at is None else [Interrupt(stop_at)]),
        ],
        logger=[HistoryLogger(folder / "history.jsonl", resume_at=resume_at)],
        val_check_interval=3,
    )
    pairs = random_pairs(20, seed=4)
    data = make_data(pairs, pairs[:5], max_steps=12, batch_size=8)
    checkpoint = None if resume_at is None else str(folder / "checkpoints" / "last.ckpt")
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except Interrupted:
        assert stop_at is not None
    return module


def curve(folder: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in rows(folder / "history.jsonl")
    ]


def test_resumed_run_with_controller_is_bit_identical(tmp_path: Path) -> None:
    """Interrupted between two measurements, two log steps and two checkpoints, with the controller at a bound."""

    def alpha() -> Controller:
        return make(TargetEntropy, target=9.0, start=0.2, every=2, max=0.22)

    straight = aligned(tmp_path / "straight", alpha=alpha())
    aligned(tmp_path / "broken", alpha=alpha(), stop_at=8)
    resumed = aligned(tmp_path / "broken", alpha=alpha(), resume_at=6)
    for name, value in straight.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name
    assert resumed.controllers.state_dict() == straight.controllers.state_dict()
    assert curve(tmp_path / "broken") == curve(tmp_path / "straight")


def test_probe_measures_once_per_due_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per step at which a controller, or a row of the record, wants to know."""
    steps: list[int] = []
    measure = Probe.measure

    def counted(self: Probe, prompts: Any, *seed: Any) -> dict[str, float]:
        if seed[0] == "train":
            steps.append(seed[1])
        return measure(self, prompts, *seed)

    monkeypatch.setattr(Probe, "measure", counted)
    alpha = make(TargetEntropy, target=1.0, start=0.2, every=2)
    aligned(tmp_path / "alpha", alpha=alpha)
    assert steps == [2, 4, 6, 8, 10, 12]
    steps.clear()
    aligned(tmp_path / "rare", alpha=make(TargetEntropy, target=1.0, start=0.2, every=3))
    assert steps == [3, 4, 6, 8, 9, 12]
    steps.clear()
    aligned(tmp_path / "constant")
    assert steps == [4, 8, 12]
    steps.clear()
    aligned(tmp_path / "unread", beta=make(TargetKL, target=1.0, every=1))  # SPO without a regularizer
    assert steps == [4, 8, 12]


def test_history_shows_coefficient_and_measurement(tmp_path: Path) -> None:
    alpha = make(TargetEntropy, target=3.0, start=0.2, every=1, max=0.21)
    aligned(tmp_path / "run", alpha=alpha, log_every=1)
    steps = [row for row in curve(tmp_path / "run") if "train/alpha" in row]
    assert len(steps) == 12 and steps[0]["train/alpha"] == 0.2
    value = 0.2
    for row in steps:
        assert row["train/alpha"] == pytest.approx(value, rel=1e-12)  # in force before this step's measurement
        assert row["train/alpha/entropy"] == row["train/entropy"]
        wanted = value * math.exp(0.1 * (1 - row["train/entropy"] / 3.0))
        value = min(wanted, 0.21)
        assert row["train/alpha/at_bound"] == float(wanted > 0.21)
    assert alpha(12) == pytest.approx(value, rel=1e-12)
    assert not any(key.startswith("train/beta/") for row in steps for key in row)


def test_reaching_a_bound_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alpha = make(TargetEntropy, target=50.0, start=0.2, every=2, max=0.3)
    module = aligned(tmp_path / "run", alpha=alpha)
    reached = [record.message for record in caplog.records if "bound" in record.message]
    assert len(reached) == 1 and alpha.saturated
    assert reached[0].startswith("alpha stands at its bound alpha.max=0.3 from step 10 on: entropy is ")
    assert reached[0].endswith("there, and its target is 50")

    caplog.clear()
    for measured in (49.0, 51.0, 40.0, 30.0, 99.0, 98.0, 1.0):  # two more entries
        module.controllers.adjust({"entropy": measured}, 12)
        alpha.ascended = 0.3
    assert len([record for record in caplog.records if "bound" in record.message]) == 2
    alpha.ascended, alpha.saturated = 0.001, False
    module.controllers.adjust({"entropy": 99.0}, 12)
    assert "alpha.min=0.001" in caplog.records[-1].message and caplog.records[-1].levelno == logging.WARNING


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_cache(tmp_path_factory)


ENTROPY = ("alpha=target_entropy", "alpha.target=0.8")
KL = ("beta=target_kl", "beta.target=5")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["alpha=target_entropy"], "alpha.target is not set: the entropy of the policy to aim for, in nats per"),
        (["beta=target_kl"], "beta.target is not set: the KL of the policy to the reference to aim for"),
        (["beta=target_kl", "beta.target=-1"], "beta.target=-1: must be a positive number"),
        ([*ENTROPY, "alpha.every=0"], "alpha.every=0: must be at least 1"),
        ([*ENTROPY, "alpha.start=2", "alpha.max=1"], "alpha: start=2 must lie between the bounds min=0.02 and max=1"),
        ([*ENTROPY, "probe.num_prompts=0"], "alpha=target_entropy measures the policy on the probe's samples, but"),
        ([*KL, "probe.num_prompts=0", "method=dpo"], "beta=target_kl measures the policy on the probe's samples"),
        (
            [*KL, "method=dpo", "reference=precomputed"],
            "the KL to a reference model, but reference=precomputed provides",
        ),
        ([*KL, "regularizer=local_kl", "reference=none"], "the KL to a reference model, but reference=none provides"),
    ],
)
def test_impossible_controllers_are_configuration_problems(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigProblems) as caught:
        plan(overrides)
    assert part in str(caught.value)


def test_unused_coefficient_needs_no_measurement() -> None:
    unread = compose([*ENTROPY, "method=dpo", "probe.num_prompts=0"])
    assert problems(unread) == []
    assert warnings(unread) == ["dpo does not read alpha: what you set it to has no effect"]
    assert problems(compose([*ENTROPY, "regularizer=none", "reference=none"])) == []
    [note] = warnings(compose([*ENTROPY, "alpha.every=200"]))
    assert note == "alpha.every=200 is more than trainer.max_steps=100: alpha is never adjusted"


def test_run_with_both_controllers(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [TINY, *ENTROPY, *KL, "alpha.every=1", "beta.every=2", "beta.max=0.1", "beta.target=0.001"]
    metrics = job(tmp_path / "run", cache, *settings)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "alpha 0.03, adjusted to entropy 0.8 nats per token" in shown
    assert "beta 0.1, adjusted to kl 0.001 nats per sequence, weight of the regularizer" in shown
    assert metrics["train/beta/at_bound"] == 1.0 and metrics["train/alpha/at_bound"] == 0.0
    assert metrics["train/beta"] == 0.1 != metrics["train/alpha"]
    assert metrics["train/beta/kl"] == metrics["train/kl"]
    ended = json.loads((tmp_path / "run/coefficients.json").read_text())
    assert ended["beta"] == 0.1 and ended["alpha"] != metrics["train/alpha"]  # adjusted after the last step

    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    [folder] = (tmp_path / "run/evaluations").iterdir()
    repeated = {key: value for key, value in numbers(folder).items() if key.startswith("eval/")}
    assert repeated == {key: value for key, value in metrics.items() if key.startswith("eval/")}


def test_interrupted_command_resumes_exactly(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [TINY, *ENTROPY, "alpha.every=1", "trainer.log_every_n_steps=1"]
    whole = job(tmp_path / "whole", cache, *settings)
    step = AlignmentModule.training_step

    def interrupted(self: AlignmentModule, window: Any, batch_idx: int) -> None:
        if self.global_step == 3:
            raise RuntimeError("the power is gone")
        step(self, window, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr(AlignmentModule, "training_step", interrupted)
        job(tmp_path / "broken", cache, *settings)
    assert job(tmp_path / "broken", cache, *settings) == whole
    assert history(tmp_path / "broken") == history(tmp_path / "whole")
    assert len({row["train/alpha"] for row in history(tmp_path / "whole") if "train/alpha" in row}) == 4


def test_sweep_over_unused_coefficient_has_no_phantom_axis(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "-m", TINY, "method=spo,dpo", "alpha=0.03,0.5", "callbacks=none", "trainer.max_steps=1"]
    words += ["evaluation.num_prompts=2", "probe.num_prompts=1", "scheduler.num_warmup_steps=0"]
    enter(tmp_path, cache, monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")  # no cell of the table is broken into lines
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert cli.main([*words, "hydra.sweep.dir=sweep"]) == 0
    shown = capsys.readouterr()
    names = {path.name.partition("_trainer")[0] for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert names == {
        "debug-tiny_method-spo_alpha-0.03_callbacks-none",
        "debug-tiny_method-spo_alpha-0.5_callbacks-none",
        "debug-tiny_method-dpo_callbacks-none",
    }
    found = sorted((tmp_path / "sweep").glob("*/metrics.json"))
    assert len(found) == 3 and not list((tmp_path / "sweep").glob("*.1"))
    assert "train/alpha" not in numbers((tmp_path / "sweep").glob("*method-dpo*").__next__())
    assert (shown.out + shown.err).count("dpo does not read alpha") == 1
    assert shown.err.count("note: 4 jobs are 3 different runs") == 1
    assert shown.out.count("win rate against the reference") == 3  # the fourth job is the third, and not started
    assert "same as method=dpo alpha.value=0.03" in " ".join(shown.out.split())


def test_single_run_warns_once(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [TINY, "method=dpo", "trainer.max_steps=0", "evaluation.num_prompts=2"]
    first = job(tmp_path / "run", cache, *settings, "alpha=linear")
    shown = "".join(capsys.readouterr())
    output = " ".join(shown.replace("│", " ").split())
    assert output.count("dpo does not read alpha: what you set it to has no effect") == 1
    assert job(tmp_path / "run", cache, *settings, "alpha=0.3") == first  # the same run: its result is shown
    assert "does not read" not in "".join(capsys.readouterr())


# --- where the truth is known --------------------------------------------------------------------------------------

LANGUAGE = ("data=enumerable", "model=tabular", "callbacks=none", "trainer.max_steps=300", "probe.num_prompts=128")
LANGUAGE += ("trainer.val_check_interval=300", "evaluation.samples_per_prompt=1000", "optimizer.lr=0.1")
LANGUAGE += ("scheduler.num_warmup_steps=10",)


def test_entropy_of_enumerable_language_reaches_target(cache: Path, tmp_path: Path) -> None:
    settings = ["regularizer=none", "alpha=target_entropy", "alpha.target=0.9"]
    metrics = job(tmp_path / "run", cache, *LANGUAGE, *settings)
    assert metrics["eval/entropy"] == pytest.approx(0.9, rel=0.05)
    assert metrics["train/alpha"] < 0.8 and metrics["train/alpha/at_bound"] == 0  # alpha=1 would end at 1.11


@pytest.mark.parametrize(
    "settings", [["method=dpo", "beta.start=1"], ["method=spo", "beta.rate=0.3"]], ids=["dpo", "spo"]
)
def test_kl_of_enumerable_language_reaches_target(settings: list[str], cache: Path, tmp_path: Path) -> None:
    metrics = job(tmp_path / "run", cache, *LANGUAGE, *settings, "beta=target_kl", "beta.target=1.5")
    assert metrics["exact/kl_reference"] == pytest.approx(1.5, rel=0.05)
    assert metrics["train/beta/at_bound"] == 0
