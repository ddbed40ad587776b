"""A loss or gradient that is not finite never reaches the weights, and the message names pairs and cause."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spo import guard
from spo.callbacks import NonFinite
from spo.data import TokenizedPair
from spo.errors import UserError
from spo.guard import NonFiniteError
from spo.losses import DPOLoss, IPOLoss, Loss, SFTLoss, SPOLoss, WeightedSPOLoss
from spo.models import FrozenReference
from spo.notes import collect_notes
from spo.stages.evaluate import refuse_nonfinite
from spo.types import PairLogps
from tests.helpers import PLAIN, Spied, make_data, make_module, make_trainer, random_pairs, tiny_llama

ROOT = Path(__file__).parent.parent
BAD_STEP = 2


class Faulty(DPOLoss):
    """A loss that returns or differentiates to something that is not finite, in the step with a long enough list."""

    uses_reference = False

    def __init__(self, loss: float = 0.0, slope: float = 0.0) -> None:
        self.loss, self.slope, self.calls = loss, slope, 0

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        self.calls += 1
        fault = torch.full_like(pair.policy_chosen, self.slope if self.calls > BAD_STEP else 0)
        margin = pair.policy_chosen - pair.policy_rejected  # type: ignore[operator]
        losses = -torch.nn.functional.logsigmoid(margin) + _Slope.apply(margin, fault)
        return losses + (self.loss if self.calls == BAD_STEP + 1 else 0)


class _Slope(torch.autograd.Function):
    """Zero, with a given derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None


def named_pairs(n: int = 8, **changes: Any) -> list[TokenizedPair]:
    return [replace(pair, where=f"rows.jsonl, line {i + 1}") for i, pair in enumerate(random_pairs(n, 1, **changes))]


def module_with(loss: Loss[Any], **changes: Any) -> Spied:
    settings: dict[str, Any] = {"loss": loss, "lr": 0.01, "optimizer": partial(torch.optim.AdamW, fused=True)}
    return make_module(tiny_llama(0, dtype=torch.float32), **settings | changes)


def state(module: Spied) -> dict[str, Tensor]:
    """Return copies of weights and optimizer state."""
    found = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    for i, of_one in enumerate(module.trainer.optimizers[0].state.values()):
        found |= {f"{i}.{name}": value.clone() for name, value in of_one.items() if isinstance(value, Tensor)}
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


FAULTS = {"nan loss": {"loss": math.nan}, "infinite loss": {"loss": math.inf}, "gradient": {"slope": math.inf}}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "fused AdamW": partial(torch.optim.AdamW, fused=True),
    "SGD with momentum": partial(torch.optim.SGD, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
}


@pytest.fixture(params=["read at once", "read later"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Treat the CPU as it is, or like a device that the host runs ahead of."""
    if request.param == "read later":
        monkeypatch.setattr(guard, "ASYNCHRONOUS_DEVICES", ("cpu",))
    yield request.param


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bad_step_changes_neither_weights_nor_optimizer_state(
    optimizer: str, fault: str, clip_norm: float | None, device: str, tmp_path: Path
) -> None:
    def train(faults: dict[str, float], steps: int) -> Spied:
        module = module_with(Faulty(**faults), optimizer=OPTIMIZERS[optimizer], clip_norm=clip_norm)
        trainer = make_trainer(tmp_path, max_steps=steps)
        data = make_data(named_pairs(), max_steps=steps, batch_size=4)
        if faults:
            with pytest.raises(NonFiniteError, match=f"of step {BAD_STEP + 1} is (nan|inf|-inf), .*rows.jsonl, line "):
                trainer.fit(module, datamodule=data)
        else:
            trainer.fit(module, datamodule=data)
        return module

    assert_equal(state(train(FAULTS[fault], 5)), state(train({}, BAD_STEP)))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_any_micro_batch_stops_the_step_and_its_pair_is_named(position: int, tmp_path: Path) -> None:
    pairs = named_pairs(6)
    pairs[2 * position] = replace(pairs[2 * position], weight=1e308)
    module = module_with(SPOLoss(), micro_batch_size=2)
    before = state_of_weights(module)
    where = rf"\(rows.jsonl, line {2 * position + 1}\); likely cause: the weight 1e\+308 .* data.path"
    with pytest.raises(NonFiniteError, match=rf"the loss of step 1 is inf, .*{where}"):
        make_trainer(tmp_path).fit(module, datamodule=make_data(pairs, batch_size=6, micro_batch_size=2))
    assert_equal(state_of_weights(module), before)


def state_of_weights(module: Spied) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.policy.named_parameters()}


def broken_base() -> dict[str, Any]:
    model = tiny_llama(0, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = math.nan
    return {"policy": model}


CAUSES: dict[str, tuple[dict[str, Any], str]] = {
    "base weights": ({"loss": SPOLoss(), **broken_base()}, "training starts from .*up_proj.weight.*model.path"),
    "supervised": ({"loss": SFTLoss(), **broken_base()}, "training starts from .*up_proj.weight.*model.path"),
    "beta": ({"loss": IPOLoss(), "beta": 1e-30}, "beta=1e-30 makes numbers overflow"),
    "alpha": ({"loss": SPOLoss(), "alpha": 1e-39}, "alpha=1e-39 makes numbers overflow"),
    "learning rate": ({"loss": DPOLoss(), "lr": 1e30}, "lower optimizer.lr=1e.30, or limit .*gradient_clip_val=1"),
    "rate with a limit": ({"loss": DPOLoss(), "lr": 1e30, "clip_norm": 1.0}, "lower optimizer.lr=1e.30$"),
    "all pairs at once": ({"loss": WeightedSPOLoss(), **broken_base()}, "training starts from .*model.path"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_likely_cause_is_named(name: str, tmp_path: Path) -> None:
    changes, words = CAUSES[name]
    settings: dict[str, Any] = {
        "policy": tiny_llama(0, dtype=torch.float32),
        "reference": FrozenReference(),
        "reference_model": tiny_llama(1, dtype=torch.float32),
        "optimizer": torch.optim.AdamW,
    }
    module = make_module(**settings | changes)
    before = state_of_weights(module)
    with pytest.raises(NonFiniteError, match=words) as raised:
        make_trainer(tmp_path, max_steps=9).fit(module, datamodule=make_data(named_pairs(), max_steps=9))
    assert "rows.jsonl, line" in str(raised.value)
    if "lr" not in changes:
        for key, value in state_of_weights(module).items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_validation_stops_before_the_first_step(tmp_path: Path) -> None:
    selection = [*named_pairs(3), replace(named_pairs(4)[3], weight=1e308)]
    module = module_with(SPOLoss())
    with pytest.raises(NonFiniteError, match=r"validation loss at step 0 is inf: .*\(rows.jsonl, line 4\)"):
        make_trainer(tmp_path, num_sanity_val_steps=-1).fit(module, datamodule=make_data(named_pairs(), selection))
    assert module.global_step == 0


# --- skipping ------------------------------------------------------------------------------------------------------


def train_and_skip(
    folder: Path, pairs: list[TokenizedPair], steps: int, max_skipped: int = 10, checkpoint: str | None = None
) -> Spied:
    module = module_with(SPOLoss(), log_every_n_steps=100)
    trainer = make_trainer(folder, max_steps=steps, callbacks=[NonFinite("skip", max_skipped)])
    trainer.fit(module, datamodule=make_data(pairs, max_steps=6, batch_size=2), ckpt_path=checkpoint)
    return module


def with_bad_rows(*rows: int) -> list[TokenizedPair]:
    return [replace(pair, weight=1e308) if i in rows else pair for i, pair in enumerate(named_pairs(12))]


def test_skipped_steps_are_counted_and_everything_else_is_as_without_them(device: str, tmp_path: Path) -> None:
    with collect_notes() as notes:
        module = train_and_skip(tmp_path, with_bad_rows(3), 6)
    assert module.global_step == 6 and len(module.guard.skipped) == 1
    assert notes == {"notes/nonfinite_skipped": 1}
    assert all(p.isfinite().all() for p in module.policy.parameters())
    assert all(value.isfinite().all() for value in module.train_metrics.state_dict().values())
    steps = {int(one["step"]) for one in module.trainer.optimizers[0].state.values()}
    assert steps == {5}


def test_more_than_max_skipped_stops(device: str, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"2 steps were skipped before it \(callbacks.nonfinite.max_skipped=2\)"):
        train_and_skip(tmp_path, with_bad_rows(*range(12)), 6, max_skipped=2)


def test_resumed_run_continues_the_count_bit_by_bit(device: str, tmp_path: Path) -> None:
    pairs = with_bad_rows(3, 8)
    whole = train_and_skip(tmp_path, pairs, 6)
    first = train_and_skip(tmp_path, pairs, 3)
    file = str(tmp_path / "half.ckpt")
    first.trainer.save_checkpoint(file)
    with collect_notes() as notes:
        resumed = train_and_skip(tmp_path, pairs, 6, checkpoint=file)
    assert resumed.guard.skipped == whole.guard.skipped and len(whole.guard.skipped) == 2
    assert notes == {"notes/nonfinite_skipped": 2}
    assert_equal(state(resumed), state(whole))


# --- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_all_processes_decide_alike(action: str, tmp_path: Path) -> None:
    """One pair is bad, so that the loss of one process is; the other one names that pair too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command += ["-m", "tests.on_rank", "tests.test_nonfinite", action, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        if action == "stop":
            assert "(rows.jsonl, line 4); likely cause: the weight 1e+308" in found["error"]
        else:
            assert len(found["skipped"]) == 1 and found["step"] == 6


def run_as_one_of_two_processes(action: str, folder: Path) -> None:
    module = module_with(SPOLoss(), log_every_n_steps=100)
    callback = NonFinite("skip" if action == "skip" else "stop", 10)
    trainer = make_trainer(folder, max_steps=6, devices=2, strategy="ddp", callbacks=[callback])
    error = ""
    try:
        trainer.fit(module, datamodule=make_data(with_bad_rows(3), max_steps=6, batch_size=2))
    except NonFiniteError as raised:
        error = str(raised)
    result = {"error": error, "skipped": module.guard.skipped, "step": module.global_step}
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))


# --- what is saved -------------------------------------------------------------------------------------------------


def test_weights_that_an_update_made_infinite_are_not_saved(tmp_path: Path) -> None:
    pairs = [replace(pair, weight=1e12) for pair in named_pairs()]
    module = module_with(SPOLoss(), lr=1e30, optimizer=torch.optim.SGD, log_every_n_steps=100)
    trainer = make_trainer(tmp_path)
    with pytest.raises(NonFiniteError, match=r"update of step 1 made weights infinite .* lower optimizer.lr=1e\+30"):
        trainer.fit(module, datamodule=make_data(pairs))
    with pytest.raises(NonFiniteError, match="were not saved"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


def test_learning_rate_beyond_the_range_of_numbers(tmp_path: Path) -> None:
    module = module_with(SPOLoss(), lr=1e39, optimizer=torch.optim.SGD)
    with pytest.raises(NonFiniteError, match=r"the update of step 1 overflows: lower optimizer.lr=1e\+39"):
        make_trainer(tmp_path).fit(module, datamodule=make_data(named_pairs()))


def test_bias_that_masks_tokens_may_be_saved(tmp_path: Path) -> None:
    from tests.test_infinite_logits import Masking

    module = make_module(Masking(0, -math.inf, 20), loss=SPOLoss(), speed=PLAIN)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, datamodule=make_data(random_pairs(4, 1, vocab=20)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").exists()


def test_final_metrics_that_are_not_finite_are_refused() -> None:
    refuse_nonfinite({"eval/kl": 1.0, "eval/entropy": 0.0})
    with pytest.raises(UserError, match=r"eval/kl is inf, eval/reward is nan\).*policy and its samples are saved"):
        refuse_nonfinite({"eval/kl": math.inf, "eval/entropy": 1.0, "eval/reward": math.nan})


# --- memory --------------------------------------------------------------------------------------------------------


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


class Greedy(SPOLoss):
    """A loss that fails for want of memory, in training or in a validation."""

    def __init__(self, error: Exception, in_training: bool) -> None:
        self.error, self.in_training = error, in_training

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        if torch.is_grad_enabled() == self.in_training:
            raise self.error
        return super().__call__(pair, alpha=alpha, beta=beta)


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: str(error)[:20])
@pytest.mark.parametrize(("in_training", "key"), [(True, "data.micro_batch_size"), (False, "data.eval_batch_size")])
def test_lack_of_memory_is_one_sentence_with_the_keys(
    in_training: bool, key: str, error: Exception, tmp_path: Path
) -> None:
    module = module_with(Greedy(error, in_training))
    trainer = make_trainer(tmp_path, num_sanity_val_steps=-1)
    with pytest.raises(UserError, match=f"out of memory in a .*: lower {key}") as raised:
        trainer.fit(module, datamodule=make_data(named_pairs(), named_pairs()))
    assert "\n" not in str(raised.value)


def test_other_errors_keep_their_type(tmp_path: Path) -> None:
    module = module_with(Greedy(RuntimeError("shapes do not match"), True))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        make_trainer(tmp_path).fit(module, datamodule=make_data(named_pairs()))


if __name__ == "__main__":
    run_as_one_of_two_processes(sys.argv[1], Path(sys.argv[2]))
