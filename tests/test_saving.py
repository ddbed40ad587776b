"""Saved policies: the merged weights are the trained model, compared with sums that are written out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from spo.errors import UserError
from spo.evaluation.saved_policy import TrainedPolicy, rows_to_compare
from spo.models import AdapterOffReference, LoraSettings, saving
from spo.models.given_adapter import check_given_adapter
from spo.models.saving import check_mergeable, save_policy
from spo.notes import collect_notes
from tests.helpers import PLAIN, VOCAB, model_spec, random_pairs, save_model, tiny_llama, tiny_tokenizer

PAIRS = random_pairs(8, seed=3)
ROWS = rows_to_compare(PAIRS)
CPU = torch.device("cpu")
SCALE = 2.0
"""alpha / r of the adapters below."""


def lora(*targets: str) -> LoraSettings:
    return LoraSettings(r=2, alpha=4.0, dropout=0.0, target_modules="all-linear" if not targets else list(targets))


def shake(policy: nn.Module, seed: int = 0) -> None:
    """Move everything that can be trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logps(model: nn.Module) -> Tensor:
    """Return log-probs of the next token at all positions of a few sequences, by a plain forward pass."""
    with torch.no_grad():
        found = [model.eval()(input_ids=torch.tensor([row])).logits.float().log_softmax(-1)[0] for row in ROWS]
    return torch.cat(found)


def saved(policy: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    save_policy(policy, tiny_tokenizer(), folder / "policy")
    return AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype, attn_implementation="eager").eval()


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of ``adapter/`` by module and part, such as ``("lm_head", "lora_A")``."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.").removesuffix(".weight"): value for name, value in tensors.items()}


def merged_by_hand(base: nn.Module, folder: Path) -> nn.Module:
    """Return the untied base model with ``scale * B @ A`` of the saved adapter added to each adapted weight."""
    whole = tiny_llama(dtype=torch.float32, scale=0.5, tie_word_embeddings=False)
    whole.load_state_dict({name: value.clone() for name, value in base.state_dict().items()})
    weights = adapter_weights(folder)
    with torch.no_grad():
        for name in weights:
            module = name.rpartition(".lora_A")[0]
            if name.endswith(".lora_A"):
                whole.get_parameter(f"{module}.weight").add_(SCALE * weights[f"{module}.lora_B"] @ weights[name])
            elif name.endswith("lora_embedding_A"):
                module = name.removesuffix(".lora_embedding_A")
                delta = weights[f"{module}.lora_embedding_B"] @ weights[name]
                whole.get_parameter(f"{module}.weight").add_(SCALE * delta.T)
    return whole


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "targets",
    [("q_proj",), ("q_proj", "lm_head"), ("q_proj", "embed_tokens"), ("embed_tokens", "lm_head"), ()],
    ids=lambda targets: "+".join(targets) or "all-linear",
)
def test_saved_policy_is_base_plus_adapter(targets: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=tied)
    base = tiny_llama(dtype=torch.float32, tie_word_embeddings=tied)
    policy = model_spec(lora=lora(*targets)).policy(folder, seed=0)
    check_mergeable(policy)
    shake(policy)
    live = logps(policy)
    assert (live - logps(base)).abs().max() > 0.1
    reloaded: Any = saved(policy, tmp_path)
    by_hand = logps(merged_by_hand(base, tmp_path))
    torch.testing.assert_close(logps(reloaded), by_hand, rtol=0, atol=1e-4)
    torch.testing.assert_close(live, by_hand, rtol=0, atol=1e-4)
    # Weights stay tied where they are still equal; all-linear leaves the head out.
    assert reloaded.config.tie_word_embeddings == (tied and not {"lm_head", "embed_tokens"} & set(targets))
    assert any("q_proj" in name for name in adapter_weights(tmp_path)) == (targets != ("embed_tokens", "lm_head"))
    assert any("lm_head" in name for name in adapter_weights(tmp_path)) == ("lm_head" in targets)


@pytest.mark.parametrize("targets", [("c_attn",), ("c_attn", "lm_head"), ("wte",), ()])
def test_saved_policy_with_transposed_weights(targets: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    ).save_pretrained(tmp_path / "model")
    policy = model_spec(lora=lora(*targets)).policy(tmp_path / "model", seed=0)
    shake(policy)
    live = logps(policy)
    torch.testing.assert_close(logps(saved(policy, tmp_path)), live, rtol=0, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_full_policy_is_the_trained_one(tied: bool, checkpointing: bool, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=tied)
    policy = model_spec(gradient_checkpointing=checkpointing).policy(folder, seed=0)
    shake(policy)
    trained = TrainedPolicy(policy, ROWS, PLAIN, CPU)
    reloaded: Any = saved(policy, tmp_path)
    assert trained.gap(reloaded, tmp_path / "policy") == 0.0
    assert reloaded.config.tie_word_embeddings == tied


def test_half_precision_is_merged_in_float32(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    policy = model_spec(lora=lora("q_proj"), dtype="bfloat16").policy(folder, seed=0)
    shake(policy)
    trained = TrainedPolicy(policy, ROWS, PLAIN, CPU)
    reloaded = saved(policy, tmp_path, torch.bfloat16)
    weights = adapter_weights(tmp_path)
    name = "model.layers.1.self_attn.q_proj"
    base = tiny_llama(dtype=torch.float32).get_parameter(f"{name}.weight").bfloat16().float()
    expected = base + SCALE * weights[f"{name}.lora_B"].float() @ weights[f"{name}.lora_A"].float()
    assert torch.equal(reloaded.get_parameter(f"{name}.weight"), expected.bfloat16())
    with collect_notes() as notes:
        gap = trained.gap(reloaded, tmp_path / "policy")
    assert gap is not None and 1e-3 < gap < 0.5
    assert notes == {"notes/saved_policy_rounded": 1.0}


# --- a given adapter -----------------------------------------------------------------------------------------------

GIVEN: dict[str, dict[str, Any]] = {
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 1}},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["q_proj"], "init_lora_weights": "olora"},
    "fan_in_fan_out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("kind", GIVEN)
def test_given_adapter_is_the_start_the_reference_and_the_saved_policy(kind: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=True)
    made = get_peft_model(
        tiny_llama(dtype=torch.float32, tie_word_embeddings=True),
        LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, **GIVEN[kind]),
    )
    shake(made)
    made.save_pretrained(str(tmp_path / "given"))
    start = logps(made)

    spec = model_spec(lora=lora(), adapter_path=str(tmp_path / "given"))
    policy = spec.policy(folder, seed=0)
    check_mergeable(policy)
    torch.testing.assert_close(logps(policy), start, rtol=0, atol=1e-4)
    torch.testing.assert_close(logps(spec.start(folder)), start, rtol=0, atol=1e-4)
    shake(policy, seed=1)
    with AdapterOffReference().active(policy) as reference:
        torch.testing.assert_close(logps(reference), start, rtol=0, atol=1e-4)
    live = logps(policy)
    assert (live - start).abs().max() > 0.1
    torch.testing.assert_close(logps(saved(policy, tmp_path)), live, rtol=0, atol=1e-4)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(logps(again), live, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(bias="all"), "trains biases"),
        (LoraConfig(ensure_weight_tying=True), "ensure_weight_tying"),
        (LoraConfig(alora_invocation_tokens=[3]), "alora_invocation_tokens"),
        (PromptTuningConfig(num_virtual_tokens=2), "is a prompt"),
    ],
)
def test_given_adapter_that_cannot_be_saved_is_refused(config: Any, words: str) -> None:
    with pytest.raises(UserError, match=rf"model.adapter_path: this adapter .*{words}"):
        check_given_adapter(config)


def test_adapter_that_cannot_be_merged_is_refused_before_training(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float32)
    first, second = (model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1))
    second.weight = first.weight  # as in architectures that use a block again
    shared = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"model.lora.target_modules: .*q_proj shares its weights with another layer"):
        check_mergeable(shared)
    biased = get_peft_model(
        tiny_llama(dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], lora_bias=True)
    )
    with pytest.raises(UserError, match=r"model.adapter_path: the adapter of .*q_proj has a bias"):
        check_mergeable(biased)
    with pytest.raises(UserError, match="cannot be merged into the weights"):
        save_policy(biased, tiny_tokenizer(), tmp_path / "policy")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


# --- the comparison ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_policy_that_was_saved_wrong_is_refused(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=True)
    policy = model_spec(lora=lora("q_proj", "embed_tokens"), dtype=dtype).policy(folder, seed=0)
    shake(policy)
    trained = TrainedPolicy(policy, ROWS, PLAIN, CPU)
    monkeypatch.setattr(saving, "_separate_shared_weights", lambda model: None)
    reloaded = saved(policy, tmp_path, getattr(torch, dtype))
    with pytest.raises(UserError, match=r"policy is not the one that was trained: .* nats .*adapter, so nothing is"):
        trained.gap(reloaded, tmp_path / "policy")


def test_comparison_is_of_the_plain_policy(tmp_path: Path) -> None:
    policy = tiny_llama(dtype=torch.float32)
    trained = TrainedPolicy(policy, [*ROWS, [5]], replace(PLAIN, completion_only=True, max_logits=50), CPU)
    assert len(ROWS) == 8 and len(trained.logps) == sum(len(row) - 1 for row in ROWS)
    expected = torch.cat(
        [
            policy(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)[range(len(row) - 1), row[1:]]
            for row in ROWS
        ]
    )
    torch.testing.assert_close(trained.logps, expected.detach(), rtol=0, atol=1e-5)
    shifted = torch.tensor([0.0, 9e-4, 2e-3])
    for change, fails in zip(shifted, (False, False, True), strict=True):
        trained.logps = expected.detach() + change
        if fails:
            with pytest.raises(UserError, match=r"by 0\.002 nats at most"):
                trained.gap(policy, tmp_path / "policy")
        else:
            assert trained.gap(policy, tmp_path / "policy") == pytest.approx(float(change), abs=1e-5)


def test_comparison_takes_masked_tokens_and_refuses_nan(tmp_path: Path) -> None:
    policy = tiny_llama(dtype=torch.float32)
    masked = ROWS[0][1]
    policy.register_forward_hook(lambda *call: call[-1].logits.__setitem__((..., masked), -torch.inf))
    trained = TrainedPolicy(policy, ROWS, PLAIN, CPU)
    assert trained.logps.isneginf().any()
    assert trained.gap(policy, tmp_path / "policy") == 0.0
    trained.logps = torch.full_like(trained.logps, torch.nan)
    with pytest.raises(UserError, match="not the one that was trained"):
        trained.gap(policy, tmp_path / "policy")


def test_gathered_weights_are_compared_one_by_one(tmp_path: Path) -> None:
    policy = tiny_llama(dtype=torch.float32, tie_word_embeddings=True)
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    trained = TrainedPolicy(policy, ROWS, PLAIN, CPU, weights)
    save_policy(policy, tiny_tokenizer(), tmp_path / "policy", {**weights})
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert trained.gap(reloaded, tmp_path / "policy") is None
    with torch.no_grad():
        reloaded.model.norm.weight[0] += 1e-6
    with pytest.raises(UserError, match=r"1 weights differ, such as model.norm.weight; .*checkpoints, so nothing"):
        trained.gap(reloaded, tmp_path / "policy")
