"""Losses with parameters and buffers: trained with the policy, equal over micro-batches and processes, resumed."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from spo import guard
from spo.callbacks import NonFinite
from spo.data import TokenizedPair
from spo.errors import UserError
from spo.losses import PreferenceLoss, policy_margin
from spo.models import FrozenReference
from spo.models.optimizer import adamw, clip_gradients, make_apart, make_with_names
from spo.models.saving import whole_state_dict
from spo.objective import Divergence, Run, StepTerm
from spo.objective.learned import tensors_of
from spo.regularizers import NoRegularizer
from spo.types import PairLogps, Window
from tests.helpers import (
    PLAIN,
    Bigrams,
    Spied,
    make_data,
    make_module,
    make_trainer,
    random_pairs,
    run_on_two_ranks,
    tiny_llama,
)


class Headed(PreferenceLoss, nn.Module):
    """A loss of single pairs with a trained head, a norm-like scale, and a parameter that nothing uses."""

    uses_reference = False

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 1)
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.unused = nn.Parameter(torch.ones(2, 2))
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.1, -0.2]]))
            self.head.bias.fill_(0.05)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        both = torch.stack([pair.policy_chosen, policy_margin(pair)], dim=-1)
        return nn.functional.softplus(-self.scale * policy_margin(pair) + self.head(both).squeeze(-1))


class HeadedJoint(Headed):
    """A loss in which every pair depends on all pairs and on the head."""

    full_batch = True

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        losses = super().of_pairs(pair, alpha=alpha, beta=beta)
        return losses * (1 + (losses - losses.mean()).square() * self.scale)


class HeadedRunning(Headed):
    """A loss with a running mean and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def update_statistics(self, pair: PairLogps) -> None:
        self.mean.mul_(0.9).add_(0.1 * policy_margin(pair).mean())
        self.count += 1

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return super().of_pairs(pair, alpha=alpha, beta=beta) * (1 + (policy_margin(pair) - self.mean).tanh() / 2)


LOSSES: dict[str, Callable[[], Headed]] = {"pairs": Headed, "joint": HeadedJoint, "running": HeadedRunning}
STEPS = 2


def some_pairs() -> list[TokenizedPair]:
    return random_pairs(7, 1, preference=lambda i: None if i % 2 else 1 - i / 100, weight=lambda i: 0.5 + i / 10)


def fitted(folder: Path, make: Callable[[], Headed], micro: int | None = None, **changes: Any) -> Spied:
    trainer = {name: changes.pop(name) for name in ("devices", "strategy") if name in changes}
    steps, checkpoint = changes.pop("steps", STEPS), changes.pop("checkpoint", None)
    settings: dict[str, Any] = {"speed": PLAIN, "micro_batch_size": micro, "clip_norm": 0.5, "lr": 0.05}
    module = make_module(changes.pop("policy", None) or Bigrams(0), loss=make(), **settings | changes)
    data = make_data(some_pairs(), some_pairs(), max_steps=9, batch_size=7, micro_batch_size=micro, eval_batch_size=3)
    fit = make_trainer(folder, max_steps=steps, val_check_interval=1, **trainer).fit
    fit(module, datamodule=data, ckpt_path=checkpoint)
    return module


def learned(module: Spied) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_of(module.loss).items()}


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-12 * largest, msg=name)


@pytest.mark.parametrize("name", LOSSES)
def test_parameters_are_trained_and_micro_batches_do_not_matter(name: str, tmp_path: Path) -> None:
    whole = fitted(tmp_path, LOSSES[name])
    start = tensors_of(LOSSES[name]())
    after = learned(whole)
    assert {key for key in after if not torch.equal(after[key].double(), start[key].double())} == after.keys() - {
        "loss.unused"
    }
    assert all(after[key].dtype == torch.float64 for key in ("loss.scale", "loss.head.weight"))
    for micro in (1, 3):
        cut = fitted(tmp_path, LOSSES[name], micro)
        for ours, theirs in zip(cut.gradients, whole.gradients, strict=True):
            assert_near(ours, theirs)
        assert_near(learned(cut), after)


@pytest.mark.parametrize("name", ["pairs", "joint"])
def test_gradients_are_those_of_one_call(name: str, tmp_path: Path) -> None:
    from spo.data.collate import collate
    from tests.helpers import PAD, completion_logps

    batch, policy, loss = collate(some_pairs(), range(7), PAD), Bigrams(0), LOSSES[name]().double()
    pair = PairLogps.of_batch(batch, completion_logps(policy, batch.sequences), None)
    loss(pair, alpha=0.2, beta=0.1).mean().backward()
    expected = {n: p.grad for n, p in (*policy.named_parameters(), *tensors_of(loss).items()) if p.grad is not None}
    module = fitted(tmp_path, LOSSES[name], 2, clip_norm=None)
    assert not module.gradients[0].pop("loss.unused").any()
    assert_near(module.gradients[0], expected)
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in expected.values()]))
    limited = fitted(tmp_path, LOSSES[name], clip_norm=float(norm) / 2).gradients[0]
    del limited["loss.unused"]
    for key, value in expected.items():
        torch.testing.assert_close(limited[key], value / 2, rtol=1e-5, atol=0)


def test_grad_norm_is_that_of_policy_and_loss(tmp_path: Path) -> None:
    module = fitted(tmp_path, Headed, clip_norm=None)
    squares = [sum(g.square().sum() for g in gradients.values()) for gradients in module.gradients]
    logged = module.trainer.callback_metrics["train/grad_norm"]
    assert float(logged) == pytest.approx(float(squares[-1]) ** 0.5, rel=1e-6)


def test_norms_and_biases_of_a_loss_do_not_decay() -> None:
    loss, model = Headed(), Bigrams(0)
    make = partial(adamw, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, decay_norm_and_bias=False, fused=False)
    params = [*model.parameters(), *loss.parameters()]
    optimizer = make_with_names(make, {"": model, "loss.": loss}, params)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in loss.named_parameters() if id(p) in decayed} == {"head.weight", "unused"}


def test_clipping_without_a_limit_leaves_gradients_alone() -> None:
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([parameter], None)) == 5 and parameter.grad.tolist() == [3, 4]
    assert float(clip_gradients([parameter], 1.0)) == 5
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))


def test_policy_with_frozen_weights(tmp_path: Path) -> None:
    """The checkpoint lacks the frozen weights of the policy and has all tensors of the loss."""

    def policy() -> nn.Module:
        model = Bigrams(0)
        model.states.requires_grad_(False)
        return model

    def make() -> Headed:
        loss = HeadedRunning()
        loss.head.requires_grad_(False)
        return loss

    module = fitted(tmp_path, make, policy=policy())
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {key for key in state if "metrics" not in key} == {"policy.head.weight", "policy.head.bias"} | {
        *learned(module)
    }
    assert not any("loss.head" in key for key in module.gradients[0])


# --- resume and skipped steps --------------------------------------------------------------------------------------


def train(
    folder: Path,
    pairs: list[TokenizedPair],
    steps: int,
    checkpoint: str | None = None,
    micro: int | None = None,
    **changes: Any,
) -> Spied:
    settings: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, fused=True), "log_every_n_steps": 100}
    module = make_module(tiny_llama(0, dtype=torch.float32), **{"loss": HeadedRunning()} | settings | changes)
    trainer = make_trainer(folder, max_steps=steps, callbacks=[NonFinite("skip", 10)])
    data = make_data(pairs, max_steps=6, batch_size=2, micro_batch_size=micro)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module


@pytest.fixture(params=["read at once", "read later"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "read later":
        monkeypatch.setattr(guard, "ASYNCHRONOUS_DEVICES", ("cpu",))


def pairs_with(*bad: int) -> list[TokenizedPair]:
    pairs = [replace(pair, where=f"rows.jsonl, line {i + 1}") for i, pair in enumerate(random_pairs(12, 1))]
    return [replace(pair, weight=math.nan) if i in bad else pair for i, pair in enumerate(pairs)]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def everything(module: Spied) -> dict[str, Tensor]:
    states = module.trainer.optimizers[0].state.values()
    moments = {f"{i}.{name}": value for i, state in enumerate(states) for name, value in state.items()}
    return learned(module) | dict(module.policy.state_dict()) | moments


@pytest.mark.parametrize("micro", [None, 1])
def test_resumed_run_is_bit_identical(device: None, micro: int | None, tmp_path: Path) -> None:
    pairs = pairs_with(3, 8)
    whole, first = train(tmp_path, pairs, 6, micro=micro), train(tmp_path, pairs, 3, micro=micro)
    file = str(tmp_path / "half.ckpt")
    first.trainer.save_checkpoint(file)
    resumed = train(tmp_path, pairs, 6, file, micro)
    assert resumed.guard.skipped == whole.guard.skipped and len(whole.guard.skipped) == 2
    assert int(tensors_of(resumed.loss)["loss.count"]) == 4
    assert_equal(everything(resumed), everything(whole))


class Recorder(FrozenReference):
    """A reference that averages a weight of the policy over the steps that were taken."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.seen = torch.zeros(())

    def after_step(self, policy: nn.Module, step: int) -> None:
        self.steps.append(step)
        self.seen = self.seen + next(policy.parameters()).detach().sum()

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.seen = state["seen"]


def test_reference_follows_the_steps_that_are_taken(device: None, tmp_path: Path) -> None:
    def run(steps: int, checkpoint: str | None = None) -> tuple[Spied, Recorder]:
        reference = Recorder()
        models = {"reference": reference, "reference_model": tiny_llama(1, dtype=torch.float32)}
        return train(tmp_path, pairs_with(3), steps, checkpoint, **models), reference

    module, whole = run(6)
    assert whole.steps == [1, 2, 3, 4, 5] and len(module.guard.skipped) == 1
    first, half = run(3)
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.equal(torch.load(tmp_path / "half.ckpt", weights_only=True)["reference"]["seen"], half.seen)
    _, resumed = run(6, str(tmp_path / "half.ckpt"))
    assert half.steps + resumed.steps == whole.steps and torch.equal(resumed.seen, whole.seen)


def test_reference_that_moves_unannounced_is_noticed(tmp_path: Path) -> None:
    class Moved(FrozenReference):
        calls = 0

        def check_unmoved(self) -> None:
            self.calls += 1

    reference = Moved()
    module = fitted(tmp_path, Headed, reference=reference, reference_model=Bigrams(1))
    at_start = 1  # when it is attached
    assert reference.calls == at_start + STEPS + 1  # each validation, and the end
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert reference.calls == at_start + STEPS + 2
    assert "reference" not in torch.load(tmp_path / "last.ckpt", weights_only=True)


def test_broken_tensors_of_a_loss_are_not_saved(tmp_path: Path) -> None:
    for name in ("scale", "mean"):
        module = train(tmp_path, pairs_with(), 1)
        getattr(module.loss, name).data.fill_(math.nan)
        with pytest.raises(UserError, match=rf"made weights infinite or undefined \(loss.{name}\)"):
            module.trainer.save_checkpoint(tmp_path / "last.ckpt")


# --- losses that cannot be resumed ----------------------------------------------------------------------------------


class Forgetful(HeadedRunning):
    """A loss whose statistics a checkpoint would lose."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.number, self.tensor, self.list = what, 0.0, torch.zeros(()), [0.0]

    def update_statistics(self, pair: PairLogps) -> None:
        if self.what == "number":
            self.number += 0.5
        elif self.what == "tensor":
            self.tensor += 1
        elif self.what == "list":
            self.list.append(1.0)
        elif self.what == "shape":
            self.mean = torch.zeros(2)
        elif self.what == "dtype":
            self.mean = self.mean.half()


@pytest.mark.parametrize("what", ["number", "tensor", "list"])
def test_statistics_outside_of_buffers_are_refused(what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"update_statistics changes Forgetful.{what}, .*register_buffer"):
        train(tmp_path, pairs_with(), 1, loss=Forgetful(what))


@pytest.mark.parametrize(("what", "words"), [("shape", r"float32\(2,\)"), ("dtype", r"float16\(\)")])
def test_buffer_that_changes_its_form_is_refused(what: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"the buffer mean of Forgetful was float32\(\) and is {words} after a step"):
        train(tmp_path, pairs_with(), 1, loss=Forgetful(what))


def test_checkpoint_of_another_loss_is_refused(tmp_path: Path) -> None:
    train(tmp_path, pairs_with(), 1).trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"method.loss: count of Headed is missing now and of shape .* rerun=true"):
        train(tmp_path, pairs_with(), 2, str(tmp_path / "last.ckpt"), loss=Headed())


# --- several processes ----------------------------------------------------------------------------------------------


class Pull(NoRegularizer):
    """A regularizer whose term, the last one of a step, does not use the loss."""

    def part(self, run: Run) -> Divergence:
        return PullPart(run, lambda beta: 1.0)


class PullPart(Divergence):
    def terms(self, window: Window, step: int) -> Iterator[StepTerm]:
        policy = self.run.policy
        yield lambda: torch.stack([0.01 * p.square().sum() for p in policy.parameters()]).sum()


def one_of_two(name: str, folder: Path, micro: int | None, strategy: Any, **changes: Any) -> Spied:
    def make() -> Headed:
        loss = LOSSES[name]()
        if torch.distributed.is_initialized() or os.environ.get("RANK") == "1":
            with torch.no_grad():
                for tensor in tensors_of(loss).values():
                    tensor += int(os.environ["RANK"])  # A run starts from the values of the first process.
        return loss

    return fitted(folder, make, micro, devices=2, strategy=strategy, **changes)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    run_on_two_ranks(__name__, tmp_path)
    for name, make in LOSSES.items():
        alone = fitted(tmp_path, make, regularizer=Pull())
        for micro in (None, 2):
            for rank in (0, 1):
                two = torch.load(tmp_path / f"{name}_{micro}_{rank}.pt", weights_only=True)
                for ours, theirs in zip(two["gradients"], alone.gradients, strict=True):
                    assert_near(ours, theirs)
                assert_near(two["learned"], learned(alone))
                assert two["grad_norm"] == pytest.approx(float(alone.trainer.callback_metrics["train/grad_norm"]))
    straight = fitted(tmp_path, HeadedRunning, steps=STEPS + 1, **sharded())
    for kind in ("straight", "resumed"):
        found = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        assert_near(found["learned"], learned(straight))
        assert_near(found["policy"], dict(straight.policy.state_dict()))
        assert found["grad_norm"] == pytest.approx(float(straight.trainer.callback_metrics["train/grad_norm"]))


def run_as_one_of_two(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    for name in LOSSES:
        for micro in (None, 2):
            module = one_of_two(name, folder, micro, "ddp", regularizer=Pull())
            found = {"gradients": module.gradients, "learned": learned(module)}
            found["grad_norm"] = float(module.trainer.callback_metrics["train/grad_norm"])  # type: ignore[assignment]
            torch.save(found, folder / f"{name}_{micro}_{rank}.pt")
    for kind, steps, checkpoint in (
        ("half", STEPS, None),
        ("straight", STEPS + 1, None),
        ("resumed", STEPS + 1, "half"),
    ):
        file = None if checkpoint is None else str(folder / f"{checkpoint}.ckpt")
        strategy = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        module = one_of_two("running", folder, None, strategy, steps=steps, checkpoint=file, **sharded())
        module.trainer.save_checkpoint(folder / f"{kind}.ckpt")
        policy = whole_state_dict(module.policy, folder)
        if rank == 0:
            norm = float(module.trainer.callback_metrics["train/grad_norm"])
            torch.save({"learned": learned(module), "policy": policy, "grad_norm": norm}, folder / f"{kind}.pt")


def fused_adamw(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return make_apart(partial(torch.optim.AdamW, lr=lr, fused=True), params)


class Shardable(Bigrams):
    """A model whose output FSDP understands."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return CausalLMOutput(logits=super().forward(input_ids, attention_mask, use_cache).logits)


def sharded() -> dict[str, Any]:
    return {"policy": Shardable(0), "optimizer": fused_adamw}


if __name__ == "__main__":
    run_as_one_of_two(Path(sys.argv[1]))
