"""A run trained what its record says: early stops, budgets, and weights that did not change."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, callbacks
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from spo.callbacks import Checkpoint, Stop
from spo.callbacks.history import HistoryLogger
from spo.config import schema
from spo.config.checks import warnings
from spo.config.checks.callbacks import UNSUPPORTED, callback_problems
from spo.config.checks.settings import DERIVED_TRAINER_KEYS
from spo.config.checks.targets import CheckedParts
from spo.config.plan import Plan, plan
from spo.errors import ConfigProblems, UserError
from spo.losses import DPOLoss, LabelledLoss, SPOLoss
from spo.metrics.trained import Trained, describe_budget
from spo.models import FrozenReference
from spo.notes import collect_notes
from spo.regularizers import GlobalKL, NoRegularizer
from spo.stages.trained import SAMPLED_WEIGHTS, Start, check_pairs, check_steps, check_weights, note_unmoved
from spo.types import LabelledLogps
from tests.helpers import Spied, frozen, make_data, make_module, make_trainer, random_pairs, tiny_llama

LIGHTNING = "lightning.pytorch.callbacks"
STOPPING = f"{LIGHTNING}.EarlyStopping"


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


def fitted(
    folder: Path, *added: Callback, max_steps: int = 9, resume_at: int | None = None, **changes: Any
) -> tuple[Spied, Stop, Trainer]:
    """Train on 20 pairs, 8 in a step, with samples drawn every fourth step; validate every third step."""
    module = make_module(
        tiny_llama(0, scale=0.1),
        regularizer=GlobalKL(
            weight=0.1, refresh_every=4, num_samples=4, batch_size=2, max_new_tokens=3, estimator="tokenwise"
        ),
        reference=FrozenReference(),
        reference_model=tiny_llama(1, scale=0.1),
        log_every_n_steps=5,
    )
    stop = Stop()
    checkpoint = Checkpoint(str(folder / "checkpoints"), "val/loss", "min")
    trainer = make_trainer(
        folder,
        max_steps=max_steps,
        callbacks=[stop, *added, checkpoint],
        enable_checkpointing=True,
        logger=[HistoryLogger(folder / "history.jsonl", resume_at=resume_at)],
        val_check_interval=3,
        **{"min_epochs": 0} | changes,
    )
    pairs = random_pairs(20, seed=4)
    path = None if resume_at is None else str(folder / "checkpoints" / "last.ckpt")
    data = make_data(pairs, pairs[:5], max_steps=max_steps, batch_size=8)
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return module, stop, trainer


def history(folder: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row for row in rows}


# ---------------------------------------------------------------------------------------------------------- budgets


def test_budget_counts_steps_pairs_and_sampled_tokens(tmp_path: Path) -> None:
    module, stop, _ = fitted(tmp_path)
    trained = module.trained
    # Three windows are an epoch: 8, 8 and 4 pairs.
    assert (trained.steps, trained.pairs) == (9, 3 * 20) and stop.reason is None
    # Drawn before the steps 0, 4 and 8: four samples of at most three tokens.
    assert trained.sampled_tokens is not None and 3 * 4 <= trained.sampled_tokens <= 3 * 4 * 3
    last = module.regularization.buffer.held.completion_length.sum()  # type: ignore[attr-defined]
    assert trained.sampled_tokens >= last


def test_resumed_run_has_the_budget_of_the_uninterrupted_one(tmp_path: Path) -> None:
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
    straight, *_ = fitted(tmp_path / "straight")
    fitted(tmp_path / "broken", max_steps=6)
    path = tmp_path / "broken" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert 0 < checkpoint["trained"]["seconds"] < 600
    checkpoint["trained"]["seconds"] = 1000.0
    torch.save(checkpoint, path)
    resumed, *_ = fitted(tmp_path / "broken", resume_at=6)
    assert resumed.trained == straight.trained and len(resumed.gradients) == 3
    assert straight.trained.earlier_seconds == 0 and resumed.trained.earlier_seconds == 1000
    now = resumed.trained.state_dict()["seconds"]
    assert now is not None and 1000 < now < 1600 and "trained/seconds" not in resumed.trained.metrics()


def test_checkpoint_of_an_old_version_leaves_pairs_unknown(tmp_path: Path) -> None:
    fitted(tmp_path, max_steps=6)
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["trained"]
    torch.save(checkpoint, path)
    resumed, *_ = fitted(tmp_path, resume_at=6)
    assert resumed.trained == Trained(9, None, None) and resumed.trained.earlier_seconds is None
    assert resumed.trained.state_dict()["seconds"] is None
    assert resumed.trained.metrics() == {"trained/steps": 9.0}


def test_labelled_completions_are_half_pairs(tmp_path: Path) -> None:
    rows = [
        replace(pair, rejected_ids=None, rejected_text=None, label=i % 2) for i, pair in enumerate(random_pairs(6, 1))
    ]
    module = make_module(tiny_llama(0), loss=OwnLabelledLoss())
    make_trainer(tmp_path, max_steps=2).fit(module, datamodule=make_data(rows, max_steps=2, batch_size=3))
    assert module.trained == Trained(2, 3.0, 0)
    assert describe_budget(Trained(1, 1.5, 0).metrics()) == "1 steps, 1.5 pairs, 0 tokens sampled"
    assert describe_budget(Trained(1000, 8000.0, 0).metrics()) == "1,000 steps, 8,000 pairs, 0 tokens sampled"
    with pytest.raises(UserError, match=r"the label of all 6 is 0\.5"):
        check_pairs([replace(row, label=0.5) for row in rows], ReferenceLabelledLoss())


class OwnLabelledLoss(LabelledLoss):
    uses_reference = False

    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        return -(2 * logps.label - 1) * logps.policy


class ReferenceLabelledLoss(OwnLabelledLoss):
    uses_reference = True


def test_skipped_steps_are_not_trained() -> None:
    trained = Trained()
    for number, pairs in enumerate([8, 8, 4, 8]):
        trained.add_step(number, pairs)
        if number == 2:
            trained.skip_step(1)  # known only when the next step begins
    trained.skip_step(3)
    assert (trained.steps, trained.pairs) == (2, 12)
    again = Trained()
    again.load_state_dict(trained.state_dict())
    assert again == trained


class Infinite(DPOLoss):
    """A loss that is infinite at some steps, which it knows by its calls."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.calls, self.call = calls, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.call += 1
        return super().__call__(*args, **kwargs) + (float("inf") if self.call in self.calls else 0.0)


def test_steps_that_the_guard_skips_are_not_trained(tmp_path: Path) -> None:
    module = make_module(
        tiny_llama(0, scale=0.1),
        loss=Infinite(2, 4),
        reference=FrozenReference(),
        reference_model=tiny_llama(1, scale=0.1),
    )
    module.guard.max_skipped = 5
    data = make_data(random_pairs(20, seed=4), max_steps=6, batch_size=8)
    make_trainer(tmp_path, max_steps=6).fit(module, datamodule=data)
    assert module.guard.skipped == [1, 3]
    # Two epochs of 8, 8 and 4 pairs, without the second and the fourth step.
    assert (module.trained.steps, module.trained.pairs) == (4, 2 * 20 - 8 - 8)


def test_budget_in_words() -> None:
    assert describe_budget(Trained(18, 144, 2304).metrics()) == "18 steps, 144 pairs, 2,304 tokens sampled"
    assert describe_budget(Trained(18, None, None).metrics()) == "18 steps"
    assert describe_budget({}) == ""


# ------------------------------------------------------------------------------------------------------ early stops


def early_stopping(**changes: Any) -> callbacks.EarlyStopping:
    return callbacks.EarlyStopping(**{"monitor": "val/loss", "patience": 1, "min_delta": 1e9} | changes)


@pytest.mark.parametrize(
    ("callback", "changes", "steps", "words"),
    [
        (early_stopping(), {}, 6, "EarlyStopping, because val/loss did not improve in 1 validations"),
        (early_stopping(stopping_threshold=1e9), {}, 3, "EarlyStopping, because val/loss passed stopping_threshold=1"),
        (early_stopping(divergence_threshold=-1e9), {}, 3, "because val/loss passed divergence_threshold=-1000000000"),
        (early_stopping(patience=3), {}, 9, ""),
        (StopAt(4), {}, 4, "StopAt set trainer.should_stop"),
        (callbacks.LambdaCallback(on_train_batch_end=StopAt(2).on_train_batch_end), {}, 2, "LambdaCallback set"),
        (early_stopping(), {"min_steps": 8}, 8, "did not improve in"),
        (callbacks.Timer({"microseconds": 1}), {"min_steps": 2}, 2, "trainer.max_time or a Timer ran out"),
    ],
)
def test_early_stop_is_explained_and_its_last_steps_are_logged(
    callback: Callback, changes: dict[str, Any], steps: int, words: str, tmp_path: Path
) -> None:
    module, stop, trainer = fitted(tmp_path, callback, **changes)
    assert module.trained.steps == trainer.global_step == steps
    assert (stop.reason is None) if steps == 9 else words in str(stop.reason)
    last = history(tmp_path)[steps]
    assert {"train/loss", "val/loss"} <= last.keys()
    with collect_notes() as notes:
        sentence = check_steps(steps, 9, stop)
    if steps < 9:
        assert sentence == f"training stopped after {steps} of 9 steps: {stop.reason}"
        assert notes == {"notes/stopped_early": steps}
    else:
        assert sentence is None and notes == {}


@pytest.mark.parametrize("callback", [lambda: early_stopping(), lambda: StopAt(4)])
def test_stopped_run_that_resumes_trains_no_further(callback: Any, tmp_path: Path) -> None:
    """Otherwise a run that is interrupted in its evaluation would train on, to the next validation or to the end."""
    module, stop, _ = fitted(tmp_path, callback())
    steps = module.trained.steps
    rows = history(tmp_path)
    resumed, again, _ = fitted(tmp_path, callback(), resume_at=steps)
    assert resumed.gradients == [] and resumed.trained == module.trained and again.reason == stop.reason
    assert history(tmp_path) == rows
    for name, value in module.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name


def test_run_that_ran_out_of_time_resumes_with_more_time(tmp_path: Path) -> None:
    module, stop, _ = fitted(tmp_path, callbacks.Timer({"microseconds": 1}), min_steps=2)
    assert module.trained.steps == 2
    same, again, _ = fitted(tmp_path, callbacks.Timer({"microseconds": 1}), min_steps=2, resume_at=2)
    assert same.gradients == [] and again.reason == stop.reason
    assert stop.state_dict() == {"reason": None}  # as a checkpoint at the end of training has it
    longer, later, _ = fitted(tmp_path, callbacks.Timer({"hours": 1}), min_steps=2, resume_at=2)
    assert longer.trained.steps == 9 and later.reason is None


def test_stop_without_a_reason_is_an_error() -> None:
    with pytest.raises(UserError, match="stopped after 5 of 9 steps, and no callback or limit of time stopped it"):
        check_steps(5, 9, Stop())
    stop = Stop()
    stop.reason = "trainer.max_time or a Timer ran out"
    with pytest.raises(UserError, match=r"stopped after 0 of 9 steps: .* nothing was trained"):
        check_steps(0, 9, stop)
    assert check_steps(0, 0, Stop()) is None


@pytest.mark.parametrize("added", [early_stopping(monitor="val/los"), callbacks.ModelCheckpoint(monitor="val/los")])
def test_monitor_that_is_not_logged_is_refused_before_training(added: Callback, tmp_path: Path) -> None:
    words = f"{type(added).__name__} monitors val/los, which the first validation does not log: .*val/loss"
    with pytest.raises(UserError, match=words):
        fitted(tmp_path, added, num_sanity_val_steps=-1)
    assert list(history(tmp_path)) == [0]


def test_monitors_of_lightning_add_to_the_rows_of_the_history(tmp_path: Path) -> None:
    monitors = [callbacks.LearningRateMonitor("step"), callbacks.DeviceStatsMonitor(cpu_stats=True)]
    fitted(tmp_path, *monitors, log_every_n_steps=1)
    rows = history(tmp_path)
    assert list(rows) == sorted(rows) and "lr-SGD" in rows[5] and "train/loss" in rows[5]


# ------------------------------------------------------------------------------------------------ before training


def problems(*overrides: str) -> str:
    try:
        plan(list(overrides))
    except ConfigProblems as error:
        return str(error)
    return ""


def test_every_parameter_of_the_trainer_is_supported_or_refused() -> None:
    """A new version of Lightning may add one: decide about it in the schema, or in DERIVED_TRAINER_KEYS."""
    typed = {field.name for field in fields(schema.Trainer)}
    by_other_checks = {"max_time", "profiler", "benchmark", "inference_mode", "detect_anomaly"}
    parameters = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert parameters == typed | by_other_checks | DERIVED_TRAINER_KEYS.keys()


def test_parameters_of_the_trainer_that_follow_from_other_keys_are_refused() -> None:
    words = problems(*(f"+trainer.{name}=1" for name in DERIVED_TRAINER_KEYS))
    for name, instead in DERIVED_TRAINER_KEYS.items():
        assert f"trainer.{name} cannot be set: {instead}" in words


def test_settings_that_cannot_be_honored_are_refused() -> None:
    words = problems("trainer.num_sanity_val_steps=2", "trainer.profiler=simpel")
    assert "trainer.num_sanity_val_steps=2: choose -1 or 0" in words
    assert "choose simple, advanced, pytorch, xla or null; did you mean simple?" in words


def wrong(*overrides: str) -> str:
    """Return the problems of changes to a composed configuration, which is much faster than composing each."""
    cfg = composed().copy()
    for override in overrides:
        key, _, value = override.partition("=")
        OmegaConf.update(cfg, key, yaml.safe_load(value), force_add=True)
    return "\n".join(callback_problems(cfg, CheckedParts(cfg)))


@cache
def composed() -> DictConfig:
    planned = plan([])
    assert isinstance(planned, Plan)
    return planned.jobs[0].cfg


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.max_time=1h"], "trainer.max_time=1h: write DD:HH:MM:SS"),
        (["trainer.max_time={minuts: 3}"], "or a mapping, such as {hours: 12}"),
        (["trainer.max_time='00:00:00:00'"], "must be above zero"),
        (["trainer.max_time=5"], "trainer.max_time=5: "),
        (["callbacks.a._target_=torch.nn.ReLU"], "callbacks.a: ReLU is not a callback of Lightning"),
        ([f"callbacks.a._target_={LIGHTNING}.TQDMProgressBar"], "progress and a are progress bars; remove all but"),
        (
            [f"callbacks.a={{_target_: {LIGHTNING}.Timer, interval: epoch}}"],
            "callbacks.a: interval=epoch never stops a run",
        ),
        (
            [f"callbacks.a={{_target_: {STOPPING}, monitor: val/loss, check_on_train_epoch_end: true}}"],
            "callbacks.a: check_on_train_epoch_end=true never stops a run",
        ),
        (
            [f"callbacks.a={{_target_: {LIGHTNING}.StochasticWeightAveraging, swa_lrs: 0.1}}"],
            "callbacks.a: StochasticWeightAveraging is not supported: ",
        ),
        (
            [f"callbacks.a={{_target_: {LIGHTNING}.GradientAccumulationScheduler, scheduling: {{0: 2}}}}"],
            "callbacks.a: GradientAccumulationScheduler is not supported: ",
        ),
        (
            [f"callbacks.a={{_target_: {LIGHTNING}.ModelPruning, pruning_fn: l1_unstructured, amount: 0.5}}"],
            "callbacks.a: ModelPruning is not supported: ",
        ),
        *(
            ([f"callbacks.a._target_={LIGHTNING}.{name}"], f"callbacks.a: {name} is not supported: ")
            for name in (*UNSUPPORTED, "EMAWeightAveraging", "BackboneFinetuning")
            if name not in ("StochasticWeightAveraging", "GradientAccumulationScheduler", "ModelPruning")
        ),
    ],
)
def test_callback_that_cannot_be_honored_is_refused(overrides: list[str], words: str) -> None:
    assert words in wrong(*overrides)


def test_problem_of_a_callback_is_one_of_the_configuration() -> None:
    added = [f"+callbacks.a._target_={STOPPING}", "+callbacks.a.monitor=val/loss", "+callbacks.a.mode=up"]
    assert "callbacks.a: `mode` can be min, max" in problems(*added)


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.max_time='00:12:00:00'"],
        ["trainer.max_time={hours: 12}"],
        [f"callbacks.a={{_target_: {STOPPING}, monitor: val/loss}}"],
        [f"callbacks.progress._target_={LIGHTNING}.TQDMProgressBar"],
        ["callbacks.progress=null", f"callbacks.a._target_={LIGHTNING}.TQDMProgressBar"],
        ["trainer.enable_progress_bar=false", f"callbacks.a._target_={LIGHTNING}.TQDMProgressBar"],
        [f"callbacks.a._target_={LIGHTNING}.LearningRateMonitor"],
        ["callbacks=null"],
    ],
)
def test_callback_that_is_honored_passes_the_checks(overrides: list[str]) -> None:
    assert wrong(*overrides) == ""


@pytest.mark.parametrize(
    ("loss", "column", "words"),
    [
        (SPOLoss(), {"weight": lambda i: 0.0}, "the weight of all 6 is 0"),
        (DPOLoss(), {"preference": lambda i: 0.5}, "the preference of all 6 is 0.5"),
        (
            DPOLoss(),
            {"weight": lambda i: float(i < 2), "preference": lambda i: 0.5},
            "the weight of 4 is 0 and the preference of 2 is 0.5",
        ),
        (SPOLoss(), {"preference": lambda i: 0.5}, None),
        (DPOLoss(), {"preference": lambda i: 0.5 if i else 0.6}, None),
        (DPOLoss(), {}, None),
    ],
)
def test_pairs_without_a_preference_are_refused(loss: Any, column: dict[str, Any], words: str | None) -> None:
    pairs = random_pairs(6, seed=0, **column)
    if words is None:
        check_pairs(pairs, loss)
        return
    with pytest.raises(UserError, match=f"nothing can be learned from the training pairs: {words}; "):
        check_pairs(pairs, loss)


# ---------------------------------------------------------------------------------------------- unchanged weights


def config(**changes: Any) -> Any:
    return OmegaConf.create({"optimizer": {"lr": 1e-5}} | changes)


def rows(lr: float = 1e-5, norm: float | None = 1.0) -> list[dict[str, Any]]:
    return [{"step": 0, "val/loss": 1.0}, *({"step": i, "train/lr": lr, "train/grad_norm": norm} for i in (1, 2))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_share_of_changed_weights(dtype: torch.dtype) -> None:
    policy = torch.nn.Linear(100, 200).to(dtype)
    start = Start(policy)
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    assert start.changed_share(weights) == 0
    weights["weight"][50:] += 1
    assert start.changed_share(weights) == pytest.approx(0.75 * 20000 / 20200, abs=0.01)
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    assert SAMPLED_WEIGHTS < 20000
    weights["weight"][0, 1] += 1  # a place that is not sampled
    assert start.changed_share(weights) == pytest.approx(1 / 20200)


def test_frozen_weights_do_not_count() -> None:
    policy = torch.nn.Sequential(frozen(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2))
    assert set(Start(policy).fingerprints) == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("history", "dtype", "words"),
    [
        (rows(lr=0.0), torch.float32, "the learning rate was 0 in every step; lower scheduler.num_warmup_steps"),
        (rows(norm=None), torch.float32, "the gradient was infinite or undefined"),
        (rows(norm=0.0), torch.float32, "the gradient was 0 in every step"),
        (rows(), torch.float32, "updates at a learning rate of 1.000e-05 are smaller than .* in float32.* raise opt"),
        (rows(), torch.bfloat16, "numbers in bfloat16, .*; model.dtype=float32 trainer.precision=bf16-mixed computes"),
    ],
)
def test_policy_that_equals_its_base_is_an_error_with_its_cause(
    history: list[dict[str, Any]], dtype: torch.dtype, words: str
) -> None:
    policy = torch.nn.Linear(3, 3).to(dtype)
    with pytest.raises(UserError, match=f"the policy equals its base after 2 steps: .*{words}"):
        check_weights(Start(policy), policy.state_dict(), 2, config(), history)
    assert check_weights(Start(policy), policy.state_dict(), 0, config(), []) == {}


def test_run_that_skipped_all_of_its_steps_is_an_error() -> None:
    policy = torch.nn.Linear(3, 3)
    with pytest.raises(UserError, match="equals its base after 2 steps: each of them was skipped"):
        check_weights(Start(policy), policy.state_dict(), 2, config(), [], skipped=2)


def test_weight_decay_alone_is_not_training() -> None:
    policy = torch.nn.Linear(3, 3)
    decayed = {name: 0.9 * value for name, value in policy.state_dict().items()}
    assert check_weights(Start(policy), decayed, 2, config(), rows()) == {"trained/changed_share": 1.0}
    with pytest.raises(UserError, match="nothing but weight decay changed the policy after 2 steps: the gradient was"):
        check_weights(Start(policy), decayed, 2, config(), rows(norm=0.0))


def train_in(dtype: torch.dtype, folder: Path) -> dict[str, float]:
    policy = tiny_llama(0, dtype=dtype, scale=0.1)
    start = Start(policy)
    module = make_module(
        policy, loss=SPOLoss(), regularizer=NoRegularizer(), optimizer=torch.optim.AdamW, lr=1e-5, alpha=1.0
    )
    data = make_data(random_pairs(8, seed=0), max_steps=5)
    make_trainer(folder, max_steps=5).fit(module, datamodule=data)
    return check_weights(start, dict(policy.named_parameters()), 5, config(), rows())


def test_updates_that_round_away_in_bfloat16_are_noted(tmp_path: Path) -> None:
    with collect_notes() as notes:
        share = train_in(torch.float32, tmp_path)["trained/changed_share"]
    assert share > 0.9 and notes == {}
    with collect_notes() as notes:
        share = train_in(torch.bfloat16, tmp_path)["trained/changed_share"]
    assert 0 < share < 0.2 and notes == {"notes/updates_rounded": pytest.approx(share)}


def test_half_precision_is_warned_about_before_training() -> None:
    cfg = composed().copy()
    cfg.trainer.precision = "bf16-mixed"
    assert warnings(cfg) == []
    cfg.model.dtype = "bfloat16"
    assert warnings(cfg)[0].startswith("model.dtype=bfloat16 trains the weights in bfloat16, where small updates round")


@pytest.mark.parametrize(("every", "steps", "noted"), [(None, 3, False), (3, 3, False), (4, 3, True)])
def test_reference_that_never_moved_is_noted(every: int | None, steps: int, noted: bool) -> None:
    with collect_notes() as notes:
        note_unmoved(every, steps)
    assert notes == ({"notes/reference_never_moved": steps} if noted else {})
