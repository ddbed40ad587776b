"""Loading and saving of a sharded policy: the same weights as without shards, and little memory of the host."""

from __future__ import annotations

import json
import os
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from spo.errors import UserError
from spo.forward.sharding import Sharding, shard
from spo.models import saving
from spo.models.saving import save_policy, whole_state_dict
from spo.models.sharded_loading import sharded_loading
from spo.notes import collect_notes
from spo.processes import gather_objects, join, rank
from tests.helpers import BOS, EOS, model_spec, run_on_two_ranks, save_model, small_model, tiny_tokenizer

MEGABYTE = 2**20
KINDS = ("llama", "tied", "gpt2", "experts", "head of its own")


def make(kind: str, folder: Path) -> None:
    """Save a model with sizes that two processes cannot share evenly."""
    if kind == "gpt2":
        small_model(0, torch.float32).save_pretrained(folder)  # type: ignore[operator]
        tiny_tokenizer().save_pretrained(folder)
    elif kind == "experts":  # whose weights are merged while they are loaded
        config = MixtralConfig(
            vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3, bos_token_id=BOS, eos_token_id=EOS,
        )  # fmt: skip
        MixtralForCausalLM(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    else:
        save_model(folder, tie_word_embeddings=kind == "tied", hidden_size=18, num_attention_heads=3)
        if kind == "head of its own":  # although the config ties it
            file = folder / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all weights and buffers, whole."""
    state = model.state_dict() | dict(model.named_buffers())
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_as_one_of_two(folder: Path) -> None:
    join("cpu")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    sharded = partial(shard, mesh=mesh, settings=Sharding())
    if (folder / "large").exists():
        measure(folder, sharded)
        return
    found: dict[str, Any] = {}
    for kind in KINDS:
        spec = model_spec(attn_implementation="auto")
        with collect_notes() as notes:
            policy: Any = spec.policy(folder / kind, seed=0, shard=sharded)
        reference: Any = spec.start(folder / kind, shard=sharded)
        found[kind] = {
            "state": state_of(policy),
            "reference": state_of(reference),
            "tied": policy.get_input_embeddings().weight is policy.get_output_embeddings().weight,
            "sharded": isinstance(policy, FSDPModule) and isinstance(reference, FSDPModule),
            "modes": (policy.training, reference.training, any(p.requires_grad for p in reference.parameters())),
            "notes": dict(notes),
        }
        if not isinstance(policy, FSDPModule):
            sharded(policy)
        saving.MAX_GATHERED_BYTES = 5000  # several files
        weights = whole_state_dict(policy, folder)
        assert weights is not None
        if rank() == 0:
            save_policy(policy, tiny_tokenizer(), folder / f"{kind} saved", weights)
        else:
            assert weights == {}
        # A backward pass reaches each shard, through the tied weight too.
        policy(input_ids=torch.tensor([[1, 5, 6, 7]])).logits.square().sum().backward()
        gradients = {name: p.grad.full_tensor() for name, p in policy.named_parameters() if p.grad is not None}
        found[kind]["gradients"] = gradients
    with pytest.raises(UserError, match="its weights are not those of the LlamaForCausalLM"):
        model_spec().policy(folder / "damaged", seed=0, shard=sharded)
    if rank() == 0:
        torch.save(found, folder / "found.pt")


def measure(folder: Path, sharded: Any) -> None:
    """Record how much memory of the host the processes need for a model, beyond that of their libraries."""
    before = peak_megabytes()
    with sharded_loading(sharded):
        policy = AutoModelForCausalLM.from_pretrained(folder / "large", dtype=torch.float32)
    loaded = sum(gather_objects(peak_megabytes() - before))
    before = peak_megabytes()
    saving.MAX_GATHERED_BYTES = 50 * MEGABYTE
    weights = whole_state_dict(policy, folder)
    assert weights is not None
    gathered = max(gather_objects(peak_megabytes() - before))
    size = sum(weight.nbytes for weight in weights.values()) / MEGABYTE
    if rank() == 0:
        (folder / "memory.json").write_text(json.dumps({"model": size, "loaded": loaded, "gathered": gathered}))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("loading")
    for kind in KINDS:
        make(kind, folder / kind)
    save_model(folder / "damaged", num_hidden_layers=1)
    file = folder / "damaged/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 2}))
    run_on_two_ranks(__name__, folder)
    return folder, torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_the_weights_of_the_whole_model(kind: str, loaded: tuple[Path, dict[str, Any]]) -> None:
    folder, found = loaded[0], loaded[1][kind]
    with collect_notes() as notes:
        whole: Any = model_spec(attn_implementation="auto").policy(folder / kind, seed=0)
    for state in (found["state"], found["reference"]):
        assert state.keys() == state_of(whole).keys()
        for name, value in state_of(whole).items():
            assert torch.equal(value, state[name]) and value.dtype == state[name].dtype, name
    assert found["tied"] == (kind == "tied") == (whole.lm_head.weight is whole.get_input_embeddings().weight)
    assert found["modes"] == (True, False, False)
    assert found["notes"] == notes
    # Whether a head is tied that both config and files have is known only when it is loaded.
    assert found["sharded"] == (kind != "head of its own")
    whole(input_ids=torch.tensor([[1, 5, 6, 7]])).logits.square().sum().backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(found["gradients"][name], parameter.grad, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_policy_is_saved_once(kind: str, loaded: tuple[Path, dict[str, Any]]) -> None:
    folder, found = loaded[0], loaded[1][kind]
    reloaded: Any = AutoModelForCausalLM.from_pretrained(folder / f"{kind} saved", dtype=torch.float32)
    state = reloaded.state_dict()
    assert all(torch.equal(value, found["state"][name]) for name, value in state.items())
    config = json.loads((folder / f"{kind} saved/config.json").read_text())
    assert config["architectures"] == [type(reloaded).__name__]
    names = os.listdir(folder / f"{kind} saved")
    assert [name for name in names if name.endswith(".safetensors")] == ["model.safetensors"]
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.slow
def test_the_host_holds_a_sharded_model_once(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    model.save_pretrained(tmp_path / "large", max_shard_size="300MB")
    del model
    run_on_two_ranks(__name__, tmp_path)
    memory = json.loads((tmp_path / "memory.json").read_text())
    assert memory["model"] > 700
    assert 0.9 * memory["model"] < memory["loaded"] < 1.3 * memory["model"], memory
    assert memory["gathered"] < 0.6 * memory["model"], memory


if __name__ == "__main__":
    run_as_one_of_two(Path(sys.argv[1]))
