"""Two processes are one: the same numbers for every method, and an exact resume on another number of processes."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from spo.losses import DPOLoss, SPOLoss
from spo.models import FrozenReference
from spo.regularizers import GlobalKL, NoRegularizer
from spo.schedules import TargetKL
from spo.stages.quiet import quiet_libraries
from spo.watch import ProbeSettings
from tests.contract_cases import ALPHA, BETA, METHODS, POLICY, REFERENCE, make_loss, references_of, some_rows
from tests.helpers import Spied, make_data, make_module, make_trainer, random_pairs, run_on_two_ranks, small_model

STEPS, SAVED_AT = 6, 3
BATCH, PAIRS = 6, 13
"""The last window of an epoch has one pair, and two processes."""
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": DDPStrategy,
    "fsdp": lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
}
COMPOSITIONS = ("dpo", "spo")
Rows = list[dict[str, float]]


class Recorded(Spied):
    """Keeps the rows that it logs, without times."""

    def _log(self, row: dict[str, float]) -> None:
        kept = {key: value for key, value in row.items() if not key.startswith("time/")}
        self.rows: Rows = [*getattr(self, "rows", []), {"step": self.global_step, **kept}]


def rows_of(module: Any, data: Any, checkpoint: Path | None = None, **trainer: Any) -> Rows:
    """Train and return the logged rows."""
    module.__class__ = Recorded
    settings = {"max_steps": STEPS, "log_every_n_steps": 1} | trainer
    make_trainer(Path("unused"), **settings).fit(
        module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True
    )
    return module.rows


def of_method(name: str, **trainer: Any) -> Rows:
    """Train with a method, on rows of which some have soft labels and weights."""
    loss = make_loss(name)
    module = make_module(
        small_model(POLICY),
        loss=loss,
        reference=FrozenReference(),
        reference_model=small_model(REFERENCE),
        alpha=ALPHA,
        beta=BETA,
    )
    module.extra_references = references_of(loss, 2)
    rows = some_rows(loss, PAIRS, soft=True)
    return rows_of(module, make_data(rows, max_steps=STEPS, batch_size=BATCH), **trainer)


def of_composition(
    name: str, checkpoint: Path | None = None, save: Path | None = None, micro: int | None = None, **trainer: Any
) -> Rows:
    """Train with DPO, or with SPO, samples that do not fit two processes, and a controller.

    Args:
        name: Name of the composition.
        checkpoint: Checkpoint to resume from.
        save: File for a checkpoint between two log steps and two drawings.
        micro: Most pairs of a micro-batch.
        trainer: Arguments of the Trainer.
    """
    is_spo = name == "spo"
    module = make_module(
        small_model(POLICY),
        loss=SPOLoss() if is_spo else DPOLoss(),
        regularizer=GlobalKL("beta", 4, 7, 5, 6, "tokenwise") if is_spo else NoRegularizer(),
        reference=FrozenReference(),
        reference_model=small_model(REFERENCE),
        beta=TargetKL(target=1.0, start=0.1, rate=0.5, gain=1.0, every=1, min=0.01, max=1.0) if is_spo else BETA,
        optimizer=torch.optim.AdamW,
        probe=ProbeSettings(3, 5),
        micro_batch_size=micro,
        log_every_n_steps=2,
    )

    def save_in_between(trainer: Trainer) -> None:
        if save is not None and trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(save)

    module.step_listeners.append(save_in_between)
    pairs = random_pairs(PAIRS, seed=4)
    data = make_data(pairs, pairs[:5], max_steps=STEPS, batch_size=BATCH, micro_batch_size=micro)
    return rows_of(module, data, checkpoint, val_check_interval=2, **trainer)


def assert_same(ours: Rows, theirs: Rows, error: float) -> None:
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value == pytest.approx(other[key], rel=error, abs=error, nan_ok=True), (one["step"], key)


@pytest.mark.slow
def test_two_processes_are_one_and_resume_each_other(tmp_path: Path) -> None:
    """All cases share one pair of processes."""
    alone = {name: of_composition(name, save=tmp_path / f"{name}_1.ckpt") for name in COMPOSITIONS}
    run_on_two_ranks(__name__, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    for name in METHODS:
        rows = of_method(name)
        assert len(rows) == STEPS and all("train/loss" in row for row in rows)
        for strategy in STRATEGIES:
            assert_same(found[strategy][name], rows, 1e-9)
    for name, rows in alone.items():
        assert any("val/loss" in row for row in rows)
        for strategy in STRATEGIES:
            assert_same(found[strategy][f"composed {name}"], rows, 1e-12)
        rest = [row for row in rows if row["step"] > SAVED_AT]
        assert_same(found["resumed"][name], rest, 1e-12)
        assert_same(of_composition(name, tmp_path / f"{name}_2.ckpt"), rest, 1e-12)
    spo = alone["spo"]
    assert all(row["train/buffer/tokens"] > 5 for row in spo if "train/loss" in row)


def run_as_one_of_two(folder: Path) -> None:
    """Run every case, and let the first process write the rows."""
    found: dict[str, dict[str, Rows]] = {}
    for strategy, make in STRATEGIES.items():
        two: dict[str, Any] = {"devices": 2, "enable_progress_bar": False}
        of_strategy = {name: of_method(name, strategy=make(), **two) for name in METHODS}
        for name in COMPOSITIONS:
            save = folder / f"{name}_2.ckpt" if strategy == "ddp" else None
            of_strategy[f"composed {name}"] = of_composition(name, save=save, micro=1, strategy=make(), **two)
        found[strategy] = of_strategy
    found["resumed"] = {
        name: of_composition(name, folder / f"{name}_1.ckpt", devices=2, strategy="ddp") for name in COMPOSITIONS
    }
    if torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as noise:
        quiet_libraries()
        run_as_one_of_two(Path(sys.argv[1]))
    messages = [str(one.message) for one in noise]
    assert not any("sync_dist" in message for message in messages), messages
