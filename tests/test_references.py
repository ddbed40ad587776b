"""References and adapters: what stays fixed, what is saved, and that there is no second model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from spo.callbacks import Checkpoint
from spo.data.collate import collate
from spo.losses import DPOLoss
from spo.models import (
    AdapterOffReference,
    CachedReference,
    FrozenReference,
    LoraSettings,
    ModelSpec,
    NoReference,
    PrecomputedReference,
)
from spo.models.saving import save_policy
from spo.records.digests import model_digest
from tests.helpers import (
    PAD,
    Spied,
    completion_logps,
    make_data,
    make_module,
    make_trainer,
    model_spec,
    random_pairs,
    save_model,
    tiny_tokenizer,
)

LORA = LoraSettings(r=2, alpha=4.0, dropout=0.0, target_modules="all-linear")
PAIRS = random_pairs(8, seed=0)
BATCH = collate(PAIRS, range(8), PAD).sequences


def randomise(policy: nn.Module, seed: int = 0) -> None:
    """Give a fresh adapter a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B.default" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", scale=0.2)


@pytest.fixture
def given_adapter(folder: Path, tmp_path: Path) -> str:
    """Return the folder of an adapter that changes the model."""
    policy: Any = model_spec(lora=LORA).policy(folder, seed=0)
    randomise(policy)
    policy.save_pretrained(tmp_path / "given")
    return str(tmp_path / "given")


def spec_of(kind: str, given_adapter: str, **changes: Any) -> ModelSpec:
    return model_spec(lora=LORA, adapter_path=given_adapter if kind == "given" else None, **changes)


def reference_logps(module: Spied) -> Tensor:
    with module.reference.active(module.policy) as reference:
        return completion_logps(reference, BATCH)


def adapted(spec: ModelSpec, folder: Path, **changes: Any) -> Spied:
    policy = spec.policy(folder, seed=0)
    return make_module(policy, loss=DPOLoss(), reference=AdapterOffReference(), lr=0.5, beta=1.0, **changes)


def fit(module: Spied, folder: Path, steps: int, **changes: Any) -> Spied:
    trainer = make_trainer(folder, max_steps=steps, **changes)
    trainer.fit(module, datamodule=make_data(PAIRS, PAIRS, max_steps=steps))
    return module


# ------------------------------------------------------------------------------------------------------ adapter off


@pytest.mark.parametrize("kind", ["fresh", "given"])
def test_adapter_off_reference_stays_initial_state(kind: str, folder: Path, given_adapter: str, tmp_path: Path) -> None:
    spec = spec_of(kind, given_adapter)
    module = adapted(spec, folder)
    start = completion_logps(spec.start(folder), BATCH)
    base = completion_logps(model_spec().base(folder), BATCH)
    assert ((start - base).abs().max() > 0.1) == (kind == "given")

    before = completion_logps(module.policy, BATCH).detach()
    assert torch.equal(reference_logps(module), before)  # so every margin is exactly 0 at step 0
    torch.testing.assert_close(before, start, rtol=0, atol=1e-5)

    fit(module, tmp_path, steps=5)
    torch.testing.assert_close(reference_logps(module), before, rtol=0, atol=0)
    assert (completion_logps(module.policy, BATCH) - before).abs().max() > 0.1
    assert all(m.training for m in module.policy.modules() if "Dropout" in type(m).__name__)


@pytest.mark.parametrize("kind", ["fresh", "given"])
def test_reference_used_inside_step_keeps_policy_gradient(
    kind: str, folder: Path, given_adapter: str, tmp_path: Path
) -> None:
    module = adapted(spec_of(kind, given_adapter), folder)
    module.trainer = None  # type: ignore[assignment]
    pair = module.pairs.score(collate(PAIRS, range(8), PAD)).inputs_of(module.loss)
    assert pair.reference_chosen is not None and pair.reference_rejected is not None
    assert torch.equal(pair.reference_chosen, pair.policy_chosen.detach())
    assert pair.policy_chosen.requires_grad and not pair.reference_chosen.requires_grad
    # switching to the reference and back in between must not cost the policy its gradient
    (pair.policy_chosen - pair.reference_chosen).sum().backward()
    gradients = {name: p.grad for name, p in module.policy.named_parameters() if p.grad is not None}
    assert gradients and all(".default." in name for name in gradients)
    assert any(g.abs().max() > 0 for g in gradients.values())


@pytest.mark.parametrize("kind", ["fresh", "given"])
def test_adapter_off_holds_no_second_model(kind: str, folder: Path, given_adapter: str, tmp_path: Path) -> None:
    module = adapted(spec_of(kind, given_adapter), folder)
    base = {p.shape for p in model_spec().base(folder).parameters()}
    named = dict(module.policy.named_parameters())
    frozen = [p for name, p in named.items() if "lora_" not in name]
    plain = list(model_spec().base(folder).parameters())
    assert sum(p.numel() for p in frozen) == sum(p.numel() for p in plain)
    assert {p.shape for p in frozen} == base
    adapters = {name.split(".")[-2] for name in named if "lora_" in name}
    assert adapters == ({"default", "reference"} if kind == "given" else {"default"})
    storages = {p.untyped_storage().data_ptr() for p in module.policy.parameters()}
    with module.reference.active(module.policy) as reference:
        assert {p.untyped_storage().data_ptr() for p in reference.parameters()} == storages


@pytest.mark.parametrize("kind", ["fresh", "given"])
def test_only_adapter_is_trained(kind: str, folder: Path, given_adapter: str, tmp_path: Path) -> None:
    module = adapted(spec_of(kind, given_adapter), folder)
    before = {name: p.clone() for name, p in module.policy.named_parameters()}
    fit(module, tmp_path, steps=2)
    changed = {name for name, p in module.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name and ".default." in name for name in changed)


def test_adapter_dropout_does_not_reach_reference(folder: Path, given_adapter: str) -> None:
    lora = LoraSettings(r=2, alpha=4.0, dropout=0.9, target_modules="all-linear")
    for adapter in (None, given_adapter):
        module = adapted(model_spec(lora=lora, adapter_path=adapter, dropout=0.5), folder)
        first = reference_logps(module)
        assert torch.equal(reference_logps(module), first)
        assert all(m.training for m in module.policy.modules())


def test_policy_restored_after_error_in_reference(folder: Path, given_adapter: str) -> None:
    for kind in ("fresh", "given"):
        module = adapted(spec_of(kind, given_adapter), folder)
        randomise(module.policy, seed=5)
        before = completion_logps(module.policy, BATCH).detach()
        with pytest.raises(ZeroDivisionError), module.reference.active(module.policy):
            raise ZeroDivisionError
        assert torch.equal(completion_logps(module.policy, BATCH), before)
        assert module.policy.training


@pytest.mark.parametrize("kind", ["fresh", "given"])
def test_checkpoint_holds_only_adapter_and_resumes(kind: str, folder: Path, given_adapter: str, tmp_path: Path) -> None:
    spec, checkpoints = spec_of(kind, given_adapter), tmp_path / "checkpoints"

    def run(steps: int, ckpt_path: str | None = None, **changes: Any) -> Spied:
        module = adapted(spec, folder)
        trainer = make_trainer(tmp_path, max_steps=steps, **changes)
        data = make_data(PAIRS, PAIRS, max_steps=steps, batch_size=4)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return module

    straight = run(4)
    saver = Checkpoint(str(checkpoints), "val/loss", "min")
    run(2, enable_checkpointing=True, callbacks=[saver], val_check_interval=2)
    state = torch.load(checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    weights = [name for name in state if name.startswith("policy.")]
    assert weights and all("lora_" in name and ".default." in name for name in weights)
    resumed = run(4, ckpt_path=str(checkpoints / "last.ckpt"))
    for (name, ours), theirs in zip(resumed.policy.named_parameters(), straight.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


# ----------------------------------------------------------------------------------------------- other references


def test_frozen_reference_has_no_dropout_and_no_gradients(folder: Path) -> None:
    import json

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    spec, reference = model_spec(dropout=0.5), FrozenReference()
    reference.attach(lambda: spec.start(folder))
    with reference.active(nn.Linear(1, 1)) as model:
        assert not any(m.training for m in model.modules())
        assert model.config.attention_dropout == 0.0
        assert not any(p.requires_grad for p in model.parameters())
        assert not torch.is_grad_enabled()
        assert torch.equal(completion_logps(model, BATCH), completion_logps(model, BATCH))
    assert torch.is_grad_enabled()


def test_references_without_model_raise() -> None:
    for reference in (NoReference(), PrecomputedReference("cache", 8), FrozenReference(), CachedReference("cache")):
        without_model = pytest.raises(RuntimeError, match=r"does not have a model to score with|not attached")
        with without_model, reference.active(nn.Linear(1, 1)):
            pass
    assert (NoReference.scores_pairs, NoReference.scores_samples) == (False, False)
    assert (PrecomputedReference.scores_pairs, PrecomputedReference.scores_samples) == (True, False)
    assert (CachedReference.scores_pairs, CachedReference.scores_samples) == (True, True)


# ------------------------------------------------------------------------------------------------- loading, saving


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("GPT2Config", ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
        ("OPTConfig", ["dropout", "attention_dropout", "layerdrop"]),
        ("GPTNeoXConfig", ["attention_dropout", "hidden_dropout"]),
        ("LlamaConfig", ["attention_dropout"]),
    ],
)
def test_every_dropout_field_of_config_is_set(config: str, fields: list[str]) -> None:
    import transformers

    from spo.models.loading import set_dropout

    made = getattr(transformers, config)(**dict.fromkeys(fields, 0.3))
    set_dropout(made, 0.0)
    assert [getattr(made, field) for field in fields] == [0.0] * len(fields)


def test_adapter_initialization_follows_seed_and_keeps_global_rng(folder: Path) -> None:
    state = torch.get_rng_state()
    first, again, other = (model_spec(lora=LORA).policy(folder, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    name = next(name for name, _ in first.named_parameters() if "lora_A" in name)
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert all(module.training for module in first.modules())


@pytest.mark.parametrize("kind", ["full", "fresh", "given"])
def test_saved_policy_loads_as_plain_model_with_same_logits(
    kind: str, folder: Path, given_adapter: str, tmp_path: Path
) -> None:
    spec = model_spec() if kind == "full" else spec_of(kind, given_adapter)
    policy = spec.policy(folder, seed=0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = completion_logps(policy.eval(), BATCH).detach()
    assert (expected - completion_logps(spec.start(folder), BATCH)).abs().max() > 0.1
    (tmp_path / "run").mkdir()
    saved = tmp_path / "run" / "policy"
    save_policy(policy, tiny_tokenizer(), saved)
    files = {file.name for file in saved.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in files)
    loaded = AutoModelForCausalLM.from_pretrained(saved).eval()
    assert type(loaded).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(completion_logps(loaded, BATCH), expected, rtol=0, atol=1e-4)
    ids = AutoTokenizer.from_pretrained(saved)("w5 w6", return_tensors="pt").input_ids
    assert ids.tolist() == [[5, 6]]
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 5
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists() == (kind != "full")


def test_merged_logits_agree_with_adapter(folder: Path, tmp_path: Path) -> None:
    policy: Any = model_spec(lora=LORA).policy(folder, seed=0).eval()
    randomise(policy)
    with torch.no_grad():
        expected = policy(input_ids=BATCH.input_ids).logits
        save_policy(policy, tiny_tokenizer(), tmp_path / "policy")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")(input_ids=BATCH.input_ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


def test_policy_saves_with_any_generation_config(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    save_policy(model_spec().policy(folder, seed=0), tiny_tokenizer(), tmp_path / "policy")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").config.vocab_size == 23


def test_folder_digest_covers_weights_config_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    first = model_digest(folder)
    assert first == model_digest(str(folder))
    seen = {first}
    (folder / "notes.md").write_text("no part of the model")
    assert model_digest(folder) == first
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        file = folder / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b" ")
        seen.add(model_digest(folder))
        file.write_bytes(content)
    assert len(seen) == 4 and model_digest(folder) == first
    assert model_digest("some/hub-name") != model_digest("another/hub-name")
