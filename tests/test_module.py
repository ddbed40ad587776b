"""The alignment module through a real Trainer: gradients, metrics, modes, resume, processes."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from spo import guard
from spo.callbacks import Checkpoint, DataTime
from spo.callbacks.history import HistoryLogger
from spo.data import TokenizedPair, datamodule
from spo.data.collate import collate
from spo.data.datamodule import PreferenceDataModule
from spo.forward.head import completion_logits
from spo.losses import DPOLoss, IPOLoss, PreferenceLoss, SFTLoss, SPOLoss
from spo.models import FrozenReference, NoReference
from spo.regularizers import GlobalKL, LocalKL, NoRegularizer, PairRegularizer, Regularizer, SampleRegularizer
from spo.schedules import PerStep
from spo.types import PairLogps, PreferenceBatch
from spo.watch import ProbeSettings
from tests.helpers import (
    BOS,
    EOS,
    FAST,
    PAD,
    PLAIN,
    VOCAB,
    Bigrams,
    Spied,
    completion_logps,
    frozen,
    make_data,
    make_module,
    make_trainer,
    model_spec,
    random_pairs,
    save_model,
    tiny_llama,
)

ROOT = Path(__file__).parents[1]


def global_kl(**changes: Any) -> GlobalKL:
    settings = {"weight": 0.3, "refresh_every": 2, "num_samples": 10, "batch_size": 5, "max_new_tokens": 6}
    return GlobalKL(**settings | {"estimator": "tokenwise"} | changes)  # type: ignore[arg-type]


def fit(tmp_path: Path, module: Spied, data: PreferenceDataModule, **changes: Any) -> Spied:
    make_trainer(tmp_path, max_steps=data.max_steps, **changes).fit(module, datamodule=data)
    return module


def validated(tmp_path: Path, module: Spied, data: PreferenceDataModule) -> dict[str, float]:
    trainer = make_trainer(tmp_path)
    trainer.validate(module, datamodule=data, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def trained(
    tmp_path: Path,
    loss: PreferenceLoss | None = None,
    regularizer: Regularizer | None = None,
    *,
    pairs: int = 12,
    micro: int | None = None,
    tokens: int | None = None,
    steps: int = 1,
    batch_size: int = 32,
    **changes: Any,
) -> Spied:
    module = make_module(
        tiny_llama(0, scale=0.1),
        loss=loss,
        regularizer=regularizer,
        reference=FrozenReference(),
        reference_model=tiny_llama(1, scale=0.1),
        micro_batch_size=micro,
        **changes,
    )
    train = random_pairs(pairs, seed=1, preference=lambda i: 1 - i / 100, weight=lambda i: 0.5 + i / 10)
    limits = {"micro_batch_size": micro, "micro_batch_tokens": tokens}
    return fit(tmp_path, module, make_data(train, max_steps=steps, batch_size=batch_size, **limits))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max().item() for g in theirs.values())
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance * largest, msg=name)


COMPOSITIONS: dict[str, tuple[PreferenceLoss, Regularizer]] = {
    "dpo": (DPOLoss(), NoRegularizer()),
    "ipo_local": (IPOLoss(), LocalKL(0.3)),
    "spo_global": (SPOLoss(), global_kl()),
    "sft": (SFTLoss(), NoRegularizer()),
}


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_gradients_same_for_any_micro_batch(name: str, tmp_path: Path) -> None:
    loss, regularizer = COMPOSITIONS[name]
    whole = trained(tmp_path, loss, regularizer, pairs=44, steps=3)
    assert len(whole.gradients) == 3
    for limits in ({"micro": 8}, {"micro": 5}, {"tokens": 60}, {"micro": 6, "tokens": 90}):
        cut = trained(tmp_path, loss, regularizer, pairs=44, **limits, steps=3)
        for ours, theirs in zip(cut.gradients, whole.gradients, strict=True):
            assert_same(ours, theirs, 1e-5)  # Llama's norms are float32 inside
        assert len(cut.sampled) == len(whole.sampled) == (3 if name == "spo_global" else 0)
        for mine, other in zip(cut.sampled, whole.sampled, strict=True):
            assert torch.equal(mine, other)


SWITCHES = {
    "plain": PLAIN,
    **{
        f"{name}={value}": replace(FAST, **{name: value})
        for name, value in asdict(PLAIN).items()
        if asdict(FAST)[name] != value
    },
    "compile=True": replace(FAST, compile=True),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("switch", [*SWITCHES][:-1])
def test_gradients_same_for_any_speed_switch(name: str, switch: str, tmp_path: Path) -> None:
    """Each key of the group ``speed`` switched off by itself, and all of them, over three steps and two drawings."""
    loss, regularizer = COMPOSITIONS[name]
    fast, other = (
        trained(tmp_path, loss, regularizer, pairs=24, steps=3, batch_size=8, speed=s, micro=5)
        for s in (FAST, SWITCHES[switch])
    )
    assert fast.speed.probed
    for ours, theirs in zip(fast.gradients, other.gradients, strict=True):
        assert_same(ours, theirs, 1e-5)  # Llama's norms are float32 inside
    for mine, its in zip(fast.sampled, other.sampled, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "spo_global"])
def test_compiled_blocks_same_gradients_and_compiled_once(name: str, tmp_path: Path) -> None:
    loss, regularizer = COMPOSITIONS[name]
    plain, compiled = (
        trained(tmp_path, loss, regularizer, pairs=40, steps=5, batch_size=8, speed=speed)
        for speed in (FAST, SWITCHES["compile=True"])
    )
    for ours, theirs in zip(compiled.gradients, plain.gradients, strict=True):
        assert_same(ours, theirs, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["recompile_limit"]


@pytest.mark.parametrize("name", ["dpo", "ipo_local", "spo_global"])
def test_gradient_is_mean_loss_plus_weighted_divergence(name: str, tmp_path: Path) -> None:
    loss, regularizer = COMPOSITIONS[name]
    got = trained(tmp_path, loss, regularizer, pairs=9, micro=4)
    policy, reference = tiny_llama(0, scale=0.1), frozen(tiny_llama(1, scale=0.1))
    pairs = random_pairs(9, seed=1, preference=lambda i: 1 - i / 100, weight=lambda i: 0.5 + i / 10)
    batch = collate(pairs, range(9), PAD)
    logps = [completion_logps(model, batch.sequences) for model in (policy, reference)]
    seen = PairLogps.of_batch(batch, *logps)
    total = loss(seen, alpha=0.2, beta=0.1).mean()
    if isinstance(regularizer, PairRegularizer | SampleRegularizer):
        sequences = got.buffer.rows(0) if got.buffer is not None else batch.sequences
        p, q = (completion_logits(model, sequences) for model in (policy, reference))
        total = total + 0.3 * regularizer(p, q, sequences).mean()
    total.backward()
    assert_same(got.gradients[0], {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}, 1e-5)


def test_regularizer_settings_change_samples_and_gradient(tmp_path: Path) -> None:
    runs = {
        "base": trained(tmp_path, regularizer=global_kl(), steps=4),
        "refresh_every": trained(tmp_path, regularizer=global_kl(refresh_every=3), steps=4),
        "num_samples": trained(tmp_path, regularizer=global_kl(num_samples=6), steps=4),
        "batch_size": trained(tmp_path, regularizer=global_kl(batch_size=4), steps=4),
        "max_new_tokens": trained(tmp_path, regularizer=global_kl(max_new_tokens=3), steps=4),
        "seed": trained(tmp_path, regularizer=global_kl(), steps=4, seed=1),
        "weight": trained(tmp_path, regularizer=global_kl(weight="beta"), steps=4, beta=0.2),
        "local": trained(tmp_path, regularizer=LocalKL(0.3), steps=4),
        "none": trained(tmp_path, steps=4),
    }
    base = runs.pop("base")
    for name, run in runs.items():
        if run.sampled and name != "weight":
            same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(run.sampled, base.sampled, strict=True)]
            assert not all(same), name
        difference = sum((run.gradients[3][key] - g).abs().sum() for key, g in base.gradients[3].items())
        assert difference > 1e-6, name


def test_weight_beta_equals_same_number(tmp_path: Path) -> None:
    ours = trained(tmp_path, regularizer=global_kl(weight="beta"), beta=0.3)
    assert_same(ours.gradients[0], trained(tmp_path, regularizer=global_kl(weight=0.3)).gradients[0], 0)


def test_precomputed_reference_logps_are_used(tmp_path: Path) -> None:
    pairs = random_pairs(6, seed=1)
    absurd = torch.tensor([[300.0, -200.0]] * 6, dtype=torch.float64)

    def after_a_step(logps: dict[str, Tensor]) -> dict[str, float]:
        module = make_module(
            tiny_llama(), loss=DPOLoss(), reference=FrozenReference(), reference_model=tiny_llama(), beta=1.0
        )
        data = make_data(pairs, pairs, reference_logps=logps)
        fit(tmp_path, module, data)
        return validated(tmp_path, module, data) | {
            "gradient": max(float(g.abs().max()) for g in module.gradients[0].values())
        }

    there, stored = after_a_step({}), after_a_step({"train": absurd, "selection": absurd})
    assert there["val/loss"] < 10
    margin = stored["val/logps/chosen"] - stored["val/logps/rejected"]
    assert stored["val/loss"] == pytest.approx(500 - margin, rel=1e-6)
    assert stored["gradient"] > 1.5 * there["gradient"]  # the slope of log(sigmoid) is 1 far off, 1/2 at the margin 0


def test_step_uses_its_own_coefficients_and_learning_rate(tmp_path: Path) -> None:
    alphas, betas, rates = [0.2, 0.7, 1.5], [0.9, 0.1, 0.4], [0.0, 0.5, 0.2]
    pairs, policy, reference = random_pairs(6, seed=1), Bigrams(0), frozen(Bigrams(1))
    batch = collate(pairs, range(6), PAD)
    for alpha, beta, rate in zip(alphas, betas, rates, strict=True):
        p, q = (completion_logits(model, batch.sequences) for model in (policy, reference))
        seen = PairLogps.of_batch(batch, completion_logps(policy, batch.sequences), None)
        divergence = batch.mean_per_pair(LocalKL(0.0)(p, q, batch.sequences)).mean()
        total = SPOLoss()(seen, alpha=alpha, beta=beta).mean() + beta * divergence
        gradients = torch.autograd.grad(total, list(policy.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(policy.parameters(), gradients, strict=True):
                parameter.sub_(rate * gradient)
    module = make_module(
        Bigrams(0),
        regularizer=LocalKL("beta"),
        reference=FrozenReference(),
        reference_model=Bigrams(1),
        alpha=PerStep(alphas),
        beta=PerStep(betas),
        lr=1.0,
        speed=PLAIN,
    )
    module.make_scheduler = lambda optimizer: LambdaLR(optimizer, lambda step: [*rates, 0.0][step])
    fit(tmp_path, module, make_data(pairs, max_steps=3))
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(module.policy.get_parameter(name), parameter, msg=name)


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_gradient_clipping_limits_norm(limit: float, tmp_path: Path) -> None:
    free, clipped = trained(tmp_path), trained(tmp_path, clip_norm=limit)

    def norm(module: Spied) -> float:
        return math.sqrt(sum(float(g.square().sum()) for g in module.gradients[0].values()))

    assert norm(free) > 0.01
    assert norm(clipped) == pytest.approx(min(limit, norm(free)), rel=1e-4)
    assert clipped.trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(norm(free))


# ------------------------------------------------------------------------------------------------ modes and states


class Watcher(Callback):
    def __init__(self, reference: nn.Module) -> None:
        self.reference, self.modes = reference, []  # type: ignore[var-annotated]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        everywhere = {m.training for m in module.policy.modules()}
        self.modes.append((everywhere, {m.training for m in self.reference.modules()}))


def test_reference_is_in_eval_mode_and_not_trained(tmp_path: Path) -> None:
    policy, reference = tiny_llama().eval(), tiny_llama()
    module = make_module(policy, loss=DPOLoss(), reference=FrozenReference(), reference_model=reference, lr=0.1)
    before = [p.clone() for p in reference.parameters()]
    watcher, pairs = Watcher(reference), random_pairs(8, seed=0)
    data = make_data(pairs, pairs, max_steps=4, batch_size=4)
    fit(tmp_path, module, data, callbacks=[watcher], val_check_interval=2)
    assert watcher.modes == [({True}, {False})] * 4
    owned = {id(p) for group in module.optimizers().param_groups for p in group["params"]}  # type: ignore[union-attr]
    assert owned == {id(p) for p in policy.parameters()}
    weights = {key for key in module.state_dict() if "metrics" not in key}
    assert weights == {f"policy.{name}" for name in policy.state_dict()}
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_dpo_loss_at_step_zero_is_log_two_despite_dropout_in_config(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))

    def first_losses(dropout: float) -> tuple[float, float]:
        spec, pairs = model_spec(dropout=dropout), random_pairs(8, seed=0)
        policy, reference = spec.policy(folder, seed=0), spec.start(folder)
        module = make_module(policy, loss=DPOLoss(), reference=FrozenReference(), reference_model=reference)
        fit(tmp_path, module, make_data(pairs, pairs), val_check_interval=1)
        trained = module.trainer.callback_metrics["train/loss"].item()
        start = make_module(reference, loss=DPOLoss(), reference=FrozenReference(), reference_model=reference)
        return trained, validated(tmp_path, start, make_data(pairs, pairs))["val/loss"]

    assert first_losses(0.0) == (pytest.approx(math.log(2), abs=1e-6), pytest.approx(math.log(2), abs=1e-6))
    assert abs(first_losses(0.5)[0] - math.log(2)) > 1e-4  # asked for, dropout is there


def test_dropout_does_not_reach_probe_kl(tmp_path: Path) -> None:
    policy, reference = (
        tiny_llama(dtype=torch.float32, attention_dropout=0.9, _attn_implementation="eager") for _ in range(2)
    )
    module = make_module(
        policy,
        loss=DPOLoss(),
        reference=FrozenReference(),
        reference_model=reference,
        probe=ProbeSettings(num_prompts=3, max_new_tokens=6),
        lr=0.0,
    )
    fit(tmp_path, module, make_data(random_pairs(4, seed=0)))
    assert module.trainer.callback_metrics["train/kl"].item() == 0
    assert module.trainer.callback_metrics["train/entropy"].item() > 0


# --------------------------------------------------------------------------------------------------------- metrics


class Unigram(nn.Module):
    """The same distribution at every position, so that log-probs can be written down by hand."""

    def __init__(self, **probabilities: float) -> None:
        super().__init__()
        table = torch.full((VOCAB, 1), 1e-3, dtype=torch.float64)
        for token, probability in probabilities.items():
            table[int(token[1:])] = probability
        self.head = nn.Linear(1, VOCAB, bias=False, dtype=torch.float64)
        self.head.weight = nn.Parameter((table / table.sum()).log())

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.head(torch.ones(*input_ids.shape, 1, dtype=torch.float64)))

    def logp(self, *tokens: int) -> float:
        return float(self.head.weight.detach()[list(tokens), 0].sum())


PAIR = TokenizedPair((BOS, 9), (3, EOS), (4, 5, EOS), "", "", "", "p", preference=0.75, weight=2.0)


@pytest.mark.parametrize("loss", [SPOLoss(), DPOLoss(), IPOLoss(), SFTLoss()], ids=lambda loss: type(loss).__name__)
def test_metrics_of_pair_with_known_log_probs(loss: PreferenceLoss, tmp_path: Path) -> None:
    policy, reference = Unigram(t3=0.5, t4=0.1, t5=0.1, t2=0.2), Unigram(t3=0.2, t4=0.3, t5=0.2, t2=0.1)
    chosen, rejected = policy.logp(3, EOS), policy.logp(4, 5, EOS)
    u, v = chosen - reference.logp(3, EOS), rejected - reference.logp(4, 5, EOS)
    alpha, beta, p, weight = 0.2, 0.1, 0.75, 2.0

    def soft(t: float) -> float:
        return p * math.log1p(math.exp(-t)) + (1 - p) * math.log1p(math.exp(t))

    expected: dict[type, tuple[float, float, float]] = {
        SPOLoss: (soft(alpha * (chosen - rejected)) / alpha, alpha * chosen, alpha * rejected),
        DPOLoss: (soft(beta * (u - v)), beta * u, beta * v),
        IPOLoss: (p * (u / 2 - v / 3 - 5) ** 2 + (1 - p) * (u / 2 - v / 3 + 5) ** 2, beta * u / 2, beta * v / 3),
        SFTLoss: (-chosen, chosen, rejected),
    }
    value, reward_chosen, reward_rejected = expected[type(loss)]
    module = make_module(
        policy, loss=loss, regularizer=LocalKL(0.5), reference=FrozenReference(), reference_model=reference
    )
    got = validated(tmp_path, module, make_data([PAIR], [PAIR]))
    log_p, log_q = (model.head.weight.detach()[:, 0] for model in (policy, reference))
    kl = float((log_p.exp() * (log_p - log_q)).sum()) * (2 + 3) / 2  # five tokens, a mean over the two responses
    assert got == {
        "val/loss": pytest.approx(weight * value + 0.5 * kl),
        "val/loss/preference": pytest.approx(weight * value),
        "val/loss/regularizer": pytest.approx(kl),
        "val/rewards/chosen": pytest.approx(reward_chosen),
        "val/rewards/rejected": pytest.approx(reward_rejected),
        "val/rewards/margins": pytest.approx(reward_chosen - reward_rejected),
        "val/rewards/accuracies": 1.0,
        "val/logps/chosen": pytest.approx(chosen),
        "val/logps/rejected": pytest.approx(rejected),
        "val/logps_per_token/chosen": pytest.approx(chosen / 2),
        "val/logps_per_token/rejected": pytest.approx(rejected / 3),
        "val/p_eos": pytest.approx(math.exp(policy.logp(EOS))),
    }


@pytest.mark.parametrize("regularizer", [NoRegularizer(), LocalKL(0.3)], ids=["none", "local"])
def test_validation_same_for_any_batch_size(regularizer: Regularizer, tmp_path: Path) -> None:
    pairs = random_pairs(11, seed=4)

    def with_batches_of(size: int) -> dict[str, float]:
        module = make_module(
            tiny_llama(0),
            loss=DPOLoss(),
            regularizer=regularizer,
            reference=FrozenReference(),
            reference_model=tiny_llama(1),
            probe=ProbeSettings(num_prompts=2, max_new_tokens=4),
        )
        data = make_data(pairs, pairs, eval_batch_size=size)
        return validated(tmp_path, module, data)

    whole = with_batches_of(11)
    assert {"val/kl", "val/entropy", "val/loss"} <= whole.keys()
    for size in (1, 4, 7):
        assert with_batches_of(size) == pytest.approx(whole, rel=1e-6, abs=1e-6)


def record_rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_training_metrics_same_for_any_micro_batch_and_cover_interval(tmp_path: Path) -> None:
    def logged(micro: int | None, every: int) -> list[dict[str, Any]]:
        path = tmp_path / f"{micro}_{every}.jsonl"
        module = make_module(
            tiny_llama(0, scale=0.1),
            regularizer=global_kl(),
            reference=FrozenReference(),
            reference_model=tiny_llama(1, scale=0.1),
            micro_batch_size=micro,
            log_every_n_steps=every,
        )
        data = make_data(random_pairs(22, seed=4), max_steps=5, batch_size=11, micro_batch_size=micro)
        fit(tmp_path, module, data, logger=[HistoryLogger(path)])
        return record_rows(path)

    whole = logged(None, 1)
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5]
    assert [row["train/buffer/age"] for row in whole] == [0, 1, 0, 1, 0]
    for row in whole:
        assert row["train/loss"] == pytest.approx(row["train/loss/preference"] + 0.3 * row["train/loss/regularizer"])
        assert {"train/alpha", "train/lr", "train/grad_norm", "train/buffer/tokens"} <= row.keys()
        assert "train/beta" not in row  # the regularizer has a weight of its own here, so nothing reads beta
    for micro in (4, 7):
        for ours, theirs in zip(logged(micro, 1), whole, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    coarse = logged(None, 2)
    assert [row["step"] for row in coarse] == [2, 4, 5]
    for key in ("train/loss", "train/rewards/margins", "train/grad_norm"):
        assert coarse[0][key] == pytest.approx((whole[0][key] + whole[1][key]) / 2)
        assert coarse[2][key] == pytest.approx(whole[4][key])


class SharpnessLoss(DPOLoss):
    extra_metrics = ("sharpness",)

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        found = super().metrics(pair, alpha=alpha, beta=beta)
        return found | {"sharpness": found["rewards/margins"] ** 2}


def test_metric_that_a_loss_adds_is_logged(tmp_path: Path) -> None:
    module = make_module(
        tiny_llama(0, scale=0.1),
        loss=SharpnessLoss(),
        reference=FrozenReference(),
        reference_model=tiny_llama(1, scale=0.1),
        log_every_n_steps=1,
    )
    data = make_data([PAIR], [PAIR], max_steps=1)
    fit(tmp_path, module, data, logger=[HistoryLogger(tmp_path / "history.jsonl")])
    [row] = [row for row in record_rows(tmp_path / "history.jsonl") if "train/sharpness" in row]
    assert row["train/sharpness"] == pytest.approx(row["train/rewards/margins"] ** 2)
    got = validated(tmp_path, module, data)
    assert got["val/sharpness"] == pytest.approx(got["val/rewards/margins"] ** 2)


# ---------------------------------------------------------------------------------------------------------- resume


class Interrupted(Exception):
    pass


class Interrupt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise Interrupted


def resumable(
    folder: Path, dropout: float, workers: int, *, interrupt: int | None, resume_at: int | None = None
) -> Spied:
    policy, reference = (
        tiny_llama(seed, scale=0.1, dtype=torch.float32, attention_dropout=dropout, _attn_implementation="eager")
        for seed in (0, 1)
    )
    module = make_module(
        policy,
        regularizer=global_kl(refresh_every=4),
        reference=FrozenReference(),
        reference_model=reference,
        probe=ProbeSettings(num_prompts=2, max_new_tokens=4),
        optimizer=torch.optim.AdamW,
        log_every_n_steps=4,
    )
    pairs = random_pairs(20, seed=4)
    callbacks: list[Callback] = [Checkpoint(str(folder / "checkpoints"), "val/loss", "min")]
    trainer = make_trainer(
        folder,
        max_steps=12,
        enable_checkpointing=True,
        callbacks=[*callbacks, *([] if interrupt is None else [Interrupt(interrupt)])],
        logger=[HistoryLogger(folder / "history.jsonl", resume_at=resume_at)],
        val_check_interval=3,
    )
    data = make_data(pairs, pairs[:5], max_steps=12, batch_size=8, num_workers=workers)
    checkpoint = None if resume_at is None else str(folder / "checkpoints" / "last.ckpt")
    torch.manual_seed(0 if resume_at is None else 99)
    if interrupt is None:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    else:
        with pytest.raises(Interrupted):
            trainer.fit(module, datamodule=data)
    return module


@pytest.mark.parametrize(("dropout", "workers"), [(0.0, 0), (0.3, 0), (0.3, 2)])
def test_resumed_run_is_bit_identical(dropout: float, workers: int, tmp_path: Path) -> None:
    """Interrupted at step 8, resumed from the checkpoint of step 6: between two log steps and two drawings."""
    (tmp_path / "straight").mkdir()
    (tmp_path / "broken").mkdir()
    straight = resumable(tmp_path / "straight", dropout, workers, interrupt=None)
    resumable(tmp_path / "broken", dropout, workers, interrupt=8)
    resumed = resumable(tmp_path / "broken", dropout, workers, interrupt=None, resume_at=6)
    assert resumed.global_step == straight.global_step == 12
    assert len(resumed.gradients) == 6
    for ours, theirs in zip(resumed.sampled, straight.sampled[6:], strict=True):
        assert torch.equal(ours, theirs)
    for name, value in straight.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name
    ours, theirs = (module.optimizers().state_dict()["state"] for module in (resumed, straight))  # type: ignore[union-attr]
    assert len(ours) > 0
    for key, state in theirs.items():
        assert all(torch.equal(value, ours[key][name]) for name, value in state.items())
    rows = record_rows(tmp_path / "straight" / "history.jsonl")
    assert [row["step"] for row in rows] == [3, 4, 6, 8, 9, 12]
    assert record_rows(tmp_path / "broken" / "history.jsonl") == rows
    assert {"train/loss", "val/loss"} <= rows[-1].keys()


def test_data_wait_per_step_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any) -> PreferenceBatch:
        sleep(0.02)
        return collate(*args)

    monkeypatch.setattr(datamodule, "collate", slow)
    module, file = make_module(tiny_llama(0, scale=0.1), log_every_n_steps=2), tmp_path / "history.jsonl"
    data = make_data(random_pairs(8, seed=4), max_steps=5, batch_size=4, micro_batch_size=2)
    fit(tmp_path, module, data, logger=[HistoryLogger(file)], callbacks=[DataTime()])
    waits = {row["step"]: row["time/data_s"] for row in map(json.loads, file.read_text().splitlines())}
    assert list(waits) == [2, 4, 5] and min(waits.values()) >= 0.04  # two micro-batches in each of the steps
    assert 2 * waits[2] + 2 * waits[4] + waits[5] <= data.waited_s + 1e-9


# ------------------------------------------------------------------------------------------------------ host syncs


class NoScalars(TorchDispatchMode):
    """Lists the places in our own code at which a tensor's value is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.note(func.name())
        return func(*args, **kwargs or {})

    def note(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        if f"{ROOT}/spo/" in frames[-1].filename:
            self.places.append(f"{what} in {frames[-1].filename}:{frames[-1].lineno}")


@contextmanager
def no_host_syncs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    with NoScalars() as mode, monkeypatch.context() as patch:
        for name in ("tolist", "cpu", "numpy"):
            plain = getattr(Tensor, name)

            def noted(self: Tensor, *args: Any, plain: Any = plain, name: str = name, **kwargs: Any) -> Any:
                mode.note(name)
                return plain(self, *args, **kwargs)

            patch.setattr(Tensor, name, noted)
        yield mode.places


@pytest.mark.parametrize("name", ["dpo", "ipo_local", "spo_global"])
@pytest.mark.parametrize("fused", [True, False])
def test_step_never_waits_for_device(fused: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an optimizer that a device cannot tell to skip a step, the guard waits for one number per step."""
    loss, regularizer = COMPOSITIONS[name]
    waited: list[str] = []
    monkeypatch.setattr(guard, "ASYNCHRONOUS_DEVICES", ("cpu",))

    class Watched(Spied):
        def training_step(self, window: Any, batch_idx: int) -> None:
            if self.buffer is not None:
                self.regularization.fill(self.global_step)  # drawing samples has to wait
            with no_host_syncs(monkeypatch) as places:
                super(Spied, self).training_step(window, batch_idx)
            # The samples of the buffer and their lengths are on the host, where laying them out does not wait.
            on_host = ("types/", "forward/packing.py") if name == "spo_global" else ()
            waited.extend(place for place in places if not any(file in place for file in on_host))

    module = make_module(
        tiny_llama(0),
        loss=loss,
        regularizer=regularizer,
        reference=FrozenReference(),
        reference_model=tiny_llama(1),
        clip_norm=1.0,
        micro_batch_size=4,
        log_every_n_steps=10,
        optimizer=partial(torch.optim.AdamW, fused=fused),
    )
    module.__class__ = Watched
    fit(tmp_path, module, make_data(random_pairs(10, seed=0), max_steps=3, batch_size=8, micro_batch_size=4))
    assert module.global_step == 3
    assert [place.rpartition("/")[2].partition(":")[0] for place in waited] == ([] if fused else ["guard.py"] * 3)


def test_host_sync_detector_finds_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    with no_host_syncs(monkeypatch) as places:
        collate(random_pairs(2, seed=0), [0, 1], PAD).sequences.rows(slice(0, 1))
    assert len(places) > 1


# ------------------------------------------------------------------------------------------------------- processes


def distributed_module() -> Spied:
    return make_module(
        tiny_llama(0, scale=0.1),
        loss=DPOLoss(),
        reference=FrozenReference(),
        reference_model=tiny_llama(1, scale=0.1),
        micro_batch_size=2,
        probe=ProbeSettings(num_prompts=3, max_new_tokens=4),
    )


def distributed_data() -> PreferenceDataModule:
    pairs = random_pairs(11, seed=1, weight=lambda i: 0.5 + i / 10)
    return make_data(pairs, pairs, max_steps=2, batch_size=7, micro_batch_size=2, eval_batch_size=2)


@pytest.mark.slow
def test_two_processes_step_like_one(tmp_path: Path) -> None:
    alone = fit(tmp_path, distributed_module(), distributed_data(), val_check_interval=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command += ["-m", "tests.on_rank", "tests.test_module", str(tmp_path / "two.pt")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for ours, theirs in zip(two["gradients"], alone.gradients, strict=True):
        assert_same(ours, theirs, 1e-5)
    metrics = {key: float(value) for key, value in alone.trainer.callback_metrics.items() if "time" not in key}
    # eleven pairs and three samples, which two processes cannot share evenly
    assert {"val/loss", "val/p_eos", "val/logps_per_token/chosen", "val/kl", "val/length"} <= metrics.keys()
    assert {key: two["metrics"][key] for key in metrics} == pytest.approx(metrics, rel=1e-5)


if __name__ == "__main__":
    [out] = sys.argv[1:]
    both = fit(
        Path(out).parent,
        distributed_module(),
        distributed_data(),
        devices=2,
        strategy="ddp",
        val_check_interval=1,
    )
    if both.trainer.is_global_zero:
        logged = {key: float(value) for key, value in both.trainer.callback_metrics.items()}
        torch.save({"gradients": both.gradients, "metrics": logged}, out)


def test_run_without_reference_trains(tmp_path: Path) -> None:
    module = make_module(tiny_llama(), reference=NoReference(), probe=ProbeSettings(2, 4))
    fit(tmp_path, module, make_data(random_pairs(4, seed=0)))
    metrics = module.trainer.callback_metrics
    assert "train/kl" not in metrics and metrics["train/entropy"] > 0


@pytest.mark.parametrize(("alpha", "warned"), [(1e-6, "it is small"), (0.1, None), (1e6, "it is large")])
def test_loss_scale_far_from_one_warns(
    alpha: float, warned: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(tiny_llama(0), loss=SPOLoss(), alpha=alpha)
    with caplog.at_level("WARNING", logger="spo.watch"):
        validated(tmp_path, module, make_data(random_pairs(8, seed=0), random_pairs(8, seed=1)))
    messages = [record.getMessage() for record in caplog.records if "far from order one" in record.getMessage()]
    assert len(messages) == (0 if warned is None else 1)
    assert warned is None or warned in messages[0]
