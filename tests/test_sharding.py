"""A policy whose weights are distributed over two processes is trained as in one process.

Both processes go through all cases one after the other; what they found is compared with one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from spo.losses import DPOLoss
from spo.models import AdapterOffReference, FrozenReference
from spo.models.adapters import LoraSettings, with_fresh_adapter
from spo.models.given_adapter import add_reference_adapter
from spo.models.saving import whole_state_dict
from spo.watch import ProbeSettings
from tests.helpers import Spied, make_data, make_module, make_trainer, random_pairs, run_on_two_ranks, small_model

LORA = LoraSettings(r=2, alpha=4.0, dropout=0.0, target_modules=["c_attn", "c_proj", "lm_head"])
STEPS = 4
PROBE = ProbeSettings(num_prompts=3, max_new_tokens=5)


def adapted(given: bool = False) -> nn.Module:
    """Return a small model with an adapter; a given one changes the model from the start."""
    policy = with_fresh_adapter(small_model(0).requires_grad_(False), LORA, seed=1)
    if given:
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter += torch.linspace(-0.3, 0.3, parameter.numel(), dtype=parameter.dtype).view_as(parameter)
        add_reference_adapter(policy)
    return policy


def frozen() -> dict[str, Any]:
    return {"reference": FrozenReference(), "reference_model": small_model(1)}


CASES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "whole model": lambda: (small_model(0), frozen()),
    "fresh adapter": lambda: (adapted(), {"reference": AdapterOffReference()}),
    "given adapter": lambda: (adapted(given=True), {"reference": AdapterOffReference()}),
    "adapter and frozen reference": lambda: (adapted(), frozen()),
}


def fitted(folder: Path, name: str, steps: int = STEPS, checkpoint: Path | None = None, **trainer: Any) -> Spied:
    policy, settings = CASES[name]()
    # Not Adam, which makes rounding large where a gradient is zero.
    sgd = partial(torch.optim.SGD, momentum=0.9)
    module = make_module(policy, loss=DPOLoss(), probe=PROBE, lr=0.3, optimizer=sgd, **settings)
    pairs = random_pairs(9, seed=3)
    data = make_data(pairs, pairs, max_steps=STEPS, batch_size=6, eval_batch_size=3)
    made = make_trainer(folder, max_steps=steps, val_check_interval=2, num_sanity_val_steps=-1, **trainer)
    made.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


def assert_same(two: dict[str, Any], alone: Spied) -> None:
    weights = {name: p.detach() for name, p in alone.policy.named_parameters() if p.requires_grad}
    assert two["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-12, msg=lambda m, n=name: n + m)
    assert two["validated"] == pytest.approx(alone.validated, rel=1e-10)


def sharded() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)


def run_as_one_of_two(folder: Path) -> None:
    two = partial(fitted, folder, devices=2)
    found: dict[str, Any] = {}
    for name in CASES:
        half = two(name, steps=STEPS // 2, strategy=sharded())
        half.trainer.save_checkpoint(folder / "half.ckpt")
        resumed = two(name, checkpoint=folder / "half.ckpt", strategy=sharded())
        for kind, module in (("unbroken", two(name, strategy=sharded())), ("resumed", resumed)):
            weights = whole_state_dict(module.policy, folder)
            found[f"{name}, {kind}"] = {"weights": weights, "validated": module.validated}
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")


@pytest.mark.slow
def test_two_processes_with_shards_are_one(tmp_path: Path) -> None:
    run_on_two_ranks(__name__, tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name in CASES:
        alone = fitted(tmp_path, name)
        for kind in ("unbroken", "resumed"):
            assert_same(found[f"{name}, {kind}"], alone)


if __name__ == "__main__":
    run_as_one_of_two(Path(sys.argv[1]))
