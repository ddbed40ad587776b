"""A policy whose weights are distributed over two processes is trained as in one process.

Both processes go through all cases one after the other; what they found is compared with one process.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from spo.config.compose import compose
from spo.data.logps_store import LogpsStore
from spo.forward.head import base_model, completion_logits
from spo.forward.sharding import Sharding, gathered, round_parameters, shard
from spo.losses import DPOLoss, SFTLoss
from spo.models import AdapterOffReference, CachedReference, FrozenReference
from spo.models.adapters import LoraSettings, with_fresh_adapter
from spo.models.given_adapter import add_reference_adapter
from spo.models.saving import save_policy, whole_policy, whole_state_dict
from spo.processes import gather_objects
from spo.sampling import sample
from spo.stages.assemble import build_trainer
from spo.stages.from_config import build_sharding, resolve_values
from spo.stages.sharding import shard_while_loading
from spo.watch import ProbeSettings
from tests.helpers import (
    BOS,
    EOS,
    FAST,
    PAD,
    Spied,
    make_data,
    make_module,
    make_trainer,
    random_pairs,
    random_rows,
    run_on_two_ranks,
    sequences,
    sharded,
    small_model,
    tiny_llama,
    tiny_tokenizer,
    whole,
)

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
                    parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).to(parameter).view_as(parameter))
        add_reference_adapter(policy)
    return policy


def with_frozen() -> dict[str, Any]:
    return {"reference": FrozenReference(), "reference_model": small_model(1)}


class Case(NamedTuple):
    """A policy before training, and the settings of the module that trains it."""

    policy: Callable[[], nn.Module]
    settings: Callable[[], dict[str, Any]]


CASES = {
    "whole model": Case(partial(small_model, 0), with_frozen),
    "fresh adapter": Case(adapted, lambda: {"reference": AdapterOffReference()}),
    "given adapter": Case(partial(adapted, given=True), lambda: {"reference": AdapterOffReference()}),
    "adapter and frozen reference": Case(adapted, with_frozen),
    "cached reference": Case(partial(small_model, 0), lambda: with_frozen() | {"reference": CachedReference("")}),
}
RESUMED, SAVED = ("whole model", "given adapter"), "fresh adapter"


def fitted(
    folder: Path,
    name: str,
    steps: int = STEPS,
    checkpoint: Path | None = None,
    store: LogpsStore | None = None,
    **trainer: Any,
) -> Spied:
    case = CASES[name]
    # Not Adam, which makes rounding large where a gradient is zero.
    sgd = partial(torch.optim.SGD, momentum=0.9)
    module = make_module(case.policy(), loss=DPOLoss(), probe=PROBE, lr=0.3, optimizer=sgd, **case.settings())
    if isinstance(module.reference, CachedReference):
        module.reference.store = store
    pairs = random_pairs(9, seed=3)
    data = make_data(pairs, pairs, max_steps=STEPS, batch_size=6, eval_batch_size=3)
    made = make_trainer(folder, max_steps=steps, val_check_interval=2, num_sanity_val_steps=-1, **trainer)
    made.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


def assert_same(two: dict[str, Any], alone: Spied) -> None:
    weights = {name: p.detach() for name, p in alone.policy.named_parameters() if p.requires_grad}
    assert two["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-12, msg=name)
    assert two["validated"] == pytest.approx(alone.validated, rel=1e-10)


def run_as_one_of_two(folder: Path) -> None:
    found: dict[str, Any] = {}
    for name in CASES:
        module = fitted(folder, name, devices=2, strategy=sharded())
        weights = whole_state_dict(module.policy, folder)
        found[f"{name}, unbroken"] = {"weights": weights, "validated": module.validated}
        if isinstance(module.reference, FrozenReference):
            assert module.reference.model is not None and is_in_shards(module.reference.model)
        if name in RESUMED:
            half = fitted(folder, name, steps=STEPS // 2, devices=2, strategy=sharded())
            half.trainer.save_checkpoint(folder / "half.ckpt")
            module = fitted(folder, name, checkpoint=folder / "half.ckpt", devices=2, strategy=sharded())
            weights = whole_state_dict(module.policy, folder)
            found[f"{name}, resumed"] = {"weights": weights, "validated": module.validated}
        if name == SAVED and torch.distributed.get_rank() == 0:
            policy, rest = whole_policy(module.policy, weights, CASES[name].policy)
            save_policy(policy, tiny_tokenizer(), folder / "two" / "policy", rest)
    for part in (1, 2):  # The second time, the first process finds all log-probs and the other one none.
        rank = torch.distributed.get_rank()
        store = LogpsStore(folder / f"{rank}_{rank * part}.sqlite", torch.float64)
        module = fitted(folder, "cached reference", devices=2, strategy=sharded(), store=store)
        found[f"cached {part}"] = {"weights": whole_state_dict(module.policy, folder), "validated": module.validated}
    mesh = init_device_mesh("cpu", (2,))
    found["samples"] = {way: samples_of(*way, mesh) for way in SAMPLED}
    check_half_precision(mesh)
    save_tied(mesh, folder / "tied")
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")


def is_in_shards(model: nn.Module) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())


# --- sampling --------------------------------------------------------------------------------------------------------

PROMPTS = [[BOS, 5, 6], [BOS], [BOS, 7, 8, 9, 10], [BOS, 11], [BOS, 12, 13]]
SAMPLED = list(itertools.product(("whole", "adapter"), ("static", "generate"), (True, False, "auto")))


def drawn(model: nn.Module, rows: Sequence[int], sampler: Any) -> list[list[int]]:
    prompts = [PROMPTS[row] for row in rows]
    settings: dict[str, Any] = {"temperature": 1.0, "stop_ids": [EOS], "pad_token_id": PAD, "sampler": sampler}
    return sample(model, prompts, max_new_tokens=8, seeds=list(rows), **settings).completions()


def samples_of(kind: str, sampler: str, unshard: Any, mesh: DeviceMesh) -> list[list[int]]:
    """Let both processes draw their share, of other lengths each, and count how often they gather weights."""
    model = adapted(given=True) if kind == "adapter" else small_model(0)
    shard(model, mesh, Sharding(unshard_sampling=unshard))
    gathers: list[int] = []
    rank, original = mesh.get_rank(), _fsdp_param_group.foreach_all_gather
    first = drawn(model, [rank], sampler)  # The probes of the model gather too.

    def counted(*args: Any) -> Any:
        gathers.append(1)
        return original(*args)

    vars(_fsdp_param_group)["foreach_all_gather"] = counted
    try:
        mine = drawn(model, [[0, 1], [2, 3, 4]][rank], sampler)
    finally:
        vars(_fsdp_param_group)["foreach_all_gather"] = original
    groups = sum(isinstance(module, FSDPModule) for module in model.modules())
    assert is_in_shards(model) and (len(gathers) == groups) == bool(unshard), (len(gathers), groups)
    if unshard:
        with gathered(model):  # Inside, a process samples as often as it likes.
            assert [drawn(model, [rank], sampler) for _ in range(rank + 1)] == [first] * (rank + 1)
            assert not is_in_shards(model)
    assert is_in_shards(model)
    with torch.no_grad():
        model(torch.tensor([PROMPTS[0]]))
    assert is_in_shards(base_model(model).transformer.h)  # Blocks give their weights up after a forward pass again.
    return [row for part in gather_objects(mine) for row in part]


# --- half precision and tied weights ---------------------------------------------------------------------------------


def check_half_precision(mesh: DeviceMesh) -> None:
    """Check that passes take place in bfloat16, and that gradients are averaged in float32."""
    rows = [random_rows(3, seed) for seed in (1, 2)][mesh.get_rank()]
    policy, own = (small_model(0, torch.float32).train() for _ in range(2))
    round_parameters(own, torch.bfloat16)  # As references are that are scored before training.
    shard(policy, mesh, Sharding(compute_dtype=torch.bfloat16))
    assert FAST.resolve_for(policy).packs and FAST.resolve_for(own).packs
    for model in (policy, own):
        logits = completion_logits(model, FAST.resolve_for(model).arrange(sequences(rows)))
        assert logits.dtype == torch.bfloat16
        logits.float().square().mean().backward()
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    for ours, theirs in zip(policy.parameters(), own.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        mean = theirs.grad.float()
        torch.distributed.all_reduce(mean)
        torch.testing.assert_close(whole(ours.grad), mean / 2, rtol=1e-6, atol=1e-7)


def tied() -> nn.Module:
    return tiny_llama(0, dtype=torch.float32, tie_word_embeddings=True)


def save_tied(mesh: DeviceMesh, folder: Path) -> None:
    policy = tied()
    shard(policy, mesh, Sharding())
    policy(torch.tensor([[BOS, 5]]))
    weights = whole_state_dict(policy, folder.parent)
    assert weights is not None and "lm_head.weight" not in weights
    if mesh.get_rank() == 0:
        save_policy(policy, tiny_tokenizer(), folder, weights)


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_with_shards_are_one(tmp_path: Path) -> None:
    run_on_two_ranks(__name__, tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name in CASES:
        alone = fitted(tmp_path, name)
        for kind in ("unbroken", "resumed") if name in RESUMED else ("unbroken",):
            assert_same(found[f"{name}, {kind}"], alone)
        if name == "whole model":
            assert_same(found["cached 1"], alone)
            assert_same(found["cached 2"], alone)
        if name == SAVED:
            save_policy(alone.policy, tiny_tokenizer(), tmp_path / "one" / "policy")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / part / "policy") for part in ("two", "one"))
    assert (tmp_path / "two" / "adapter" / "adapter_model.safetensors").is_file()
    for (name, weight), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-12, msg=name)
    for kind, model in (("whole", small_model(0)), ("adapter", adapted(given=True))):
        expected = drawn(model, range(5), "generate")
        assert len({*map(tuple, expected)}) == 5
        assert all(rows == expected for way, rows in found["samples"].items() if way[0] == kind)
    saved, expected_weights = load_file(tmp_path / "tied" / "model.safetensors"), dict(tied().named_parameters())
    assert saved.keys() == expected_weights.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in expected_weights.items())


def test_switching_an_adapter_off_leaves_it_trainable(tmp_path: Path) -> None:
    """Peft switches gradients along, which FSDP2 takes over from the shards at the next forward pass."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for given in (False, True):
            policy = adapted(given)
            before = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
            shard(policy, init_device_mesh("cpu", (1,)), Sharding())
            with AdapterOffReference().active(policy) as reference:
                reference(torch.tensor([[BOS, 5]]))
            policy(torch.tensor([[BOS, 5]])).logits.sum().backward()
            found = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
            assert found.keys() == before
            assert all(parameter.grad is not None for parameter in found.values())
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_run_converts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["strategy=fsdp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.precision=bf16-mixed"]
    cfg = resolve_values(compose([*words, "trainer.max_steps=5", "strategy.unshard_sampling=false"]))
    assert build_sharding(cfg) == Sharding(torch.bfloat16, unshard_sampling=False)
    assert build_trainer(cfg, [], []).precision == "32-true"
    monkeypatch.setattr("spo.stages.sharding.world_size", lambda: 2)
    monkeypatch.setattr("spo.stages.sharding.init_device_mesh", lambda *_, **__: None)
    while_loading: Any = shard_while_loading(cfg)
    assert while_loading.keywords["settings"] == build_sharding(cfg)
    assert build_sharding(compose(["strategy=ddp"])) is None
    assert build_sharding(compose(words[:2])) == Sharding(None, "auto")


def test_checkpoint_of_an_adapter_on_tied_weights_holds_the_adapter_alone(tmp_path: Path) -> None:
    lora = LoraSettings(r=2, alpha=4.0, dropout=0.0, target_modules=["q_proj"])
    module = make_module(with_fresh_adapter(tied().requires_grad_(False), lora, seed=1), loss=SFTLoss())
    trainer = make_trainer(tmp_path)
    trainer.fit(module, datamodule=make_data(random_pairs(3, seed=3)))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    names = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    policy = [name for name in names if name.startswith("policy.")]
    assert policy and all("lora_" in name for name in policy)


if __name__ == "__main__":
    run_as_one_of_two(Path(sys.argv[1]))
