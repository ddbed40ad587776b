"""What a GPU has to agree on with the CPU, and the real command on one."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from spo.callbacks import NonFinite
from spo.data.collate import collate
from spo.forward.attention import BACK_ENDS
from spo.forward.sharding import Sharding, shard
from spo.guard import NonFiniteError
from spo.losses import DPOLoss, IPOLoss, PreferenceLoss, SPOLoss
from spo.models import FrozenReference
from spo.module import AlignmentModule
from spo.objective import ScoredBatch
from spo.regularizers import GlobalKL
from spo.sampling import sample
from spo.sampling.generate import SAMPLERS
from spo.sampling.static import decode
from spo.watch import ProbeSettings, completion_health
from tests.commands import TINY, job, shared_cache
from tests.helpers import (
    BOS,
    EOS,
    FAST,
    PAD,
    VOCAB,
    Spied,
    completion_logps,
    make_data,
    make_module,
    make_trainer,
    random_pairs,
    random_rows,
    sequences,
    tiny_llama,
)
from tests.test_packing import LAYOUTS, attention_by_definition, heads, layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_cache(tmp_path_factory)


def test_log_probs_equal_those_of_the_cpu() -> None:
    model, rows = tiny_llama(dtype=torch.float32), sequences(random_rows(16, 0))
    on_cpu = completion_logps(model, rows)
    on_gpu = completion_logps(model.to("cuda"), rows.to("cuda")).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", [SPOLoss(), DPOLoss(), IPOLoss()], ids=lambda loss: type(loss).__name__)
def test_step_gradients_equal_those_of_the_cpu(loss: PreferenceLoss, tmp_path: Path) -> None:
    found = []
    for accelerator in ("cpu", "gpu"):
        module = make_module(
            tiny_llama(1, dtype=torch.float64).train(),
            loss=loss,
            reference=FrozenReference(),
            reference_model=tiny_llama(2, dtype=torch.float64),
        )
        trainer = make_trainer(tmp_path, accelerator=accelerator)
        trainer.fit(module, datamodule=make_data(random_pairs(8, 0)))
        found.append({name: gradient.cpu() for name, gradient in module.gradients[0].items()})
    # transformers computes norms and rotary angles in float32, also for a float64 model. That rounding alone moves the
    # gradients by 7e-6 of the largest one.
    largest = max(float(gradient.abs().max()) for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=5e-5 * largest, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samplers_agree_and_rarely_wait_for_the_device(dtype: torch.dtype, temperature: float) -> None:
    model = tiny_llama(1, dtype=dtype, scale=0.3).cuda()
    prompts = [[BOS, *range(3, 3 + i % 7)] for i in range(24)]
    settings = {"max_new_tokens": 40, "temperature": temperature, "stop_ids": (EOS,), "pad_token_id": PAD}
    drawn = {
        sampler: sample(model, prompts, seeds=range(24), sampler=sampler, **settings)  # type: ignore[arg-type]
        for sampler in ("static", "generate")
    }
    assert drawn["static"].completions() == drawn["generate"].completions()
    assert drawn["static"].input_ids.is_cuda
    for length in (8, 15):  # shorter than the interval of the checks: nothing in the loop waits
        ids, mask = torch.full((4, 3), BOS, device="cuda"), torch.ones(4, 3, dtype=torch.long, device="cuda")
        mask[1, 0] = 0
        numbers = torch.rand(4, length, dtype=torch.float64, device="cuda")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                decode(model, ids, mask, numbers, temperature=temperature, stop_ids=(EOS,), pad_token_id=PAD)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert len(waits) <= 5, f"once for the lengths, and a few times in the prompts' forward: {length} tokens"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("back_end", ["flex", "launches"])
def test_packed_attention_equals_its_definition(back_end: str, dtype: torch.dtype) -> None:
    """Values and gradients, with fewer heads of keys than of queries, in rows with and without full blocks."""
    for lengths in LAYOUTS:
        groups = layout(lengths)
        exact = [tensor.cuda().requires_grad_() for tensor in heads(groups, 4, 2)]
        given = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
        expected = attention_by_definition(*exact, groups)
        found = BACK_ENDS[back_end](*given, groups, None)
        assert found.dtype == dtype
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cuda()
        wanted = [expected, *torch.autograd.grad((expected * weights).sum(), exact)]
        got = [found, *torch.autograd.grad((found * weights).sum(), given)]
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3  # of the largest entry; rounding is a tenth of it
        for one, other in zip(got, wanted, strict=True):
            largest = float(other.abs().max())
            torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * largest)


def test_packed_attention_takes_the_mixed_dtypes_of_autocast() -> None:
    groups = layout(LAYOUTS[2])
    query, key, value = (tensor.float().cuda() for tensor in heads(groups, 4, 2))
    expected = attention_by_definition(query.double(), key.double(), value.double(), groups)
    for name in ("flex", "launches"):
        with torch.autocast("cuda", torch.bfloat16):
            found = BACK_ENDS[name](query, key, value.bfloat16(), groups, None)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("autocast", [False, True])
def test_flex_attention_is_accepted_and_keeps_gradients(autocast: bool) -> None:
    model = tiny_llama(
        1, dtype=torch.float32, scale=0.2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2
    ).cuda()
    rows = sequences(random_rows(16, 0))

    def gradients(batch: Any) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            completion_logps(model, batch).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]

    padded = gradients(rows.to("cuda"))
    speed = FAST.resolve_for(model)
    assert speed.packs and model.config._attn_implementation == "packed_flex_sdpa"  # type: ignore[union-attr]
    packed = gradients(speed.arrange(rows).to("cuda"))
    assert float((packed - padded).norm() / padded.norm()) < (5e-2 if autocast else 1e-3)


def test_compiled_blocks_keep_gradients(tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        module = make_module(
            tiny_llama(1, dtype=torch.float32).train(),
            loss=DPOLoss(),
            reference=FrozenReference(),
            reference_model=tiny_llama(2, dtype=torch.float32),
            speed=replace(FAST, compile=compiled),
        )
        trainer = make_trainer(tmp_path, accelerator="gpu", max_steps=3)
        trainer.fit(module, datamodule=make_data(random_pairs(24, 0), max_steps=3))
        assert trainer.global_step == 3
        found.append(module.gradients[0])
    largest = max(float(gradient.abs().max()) for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-3 * largest)


def test_sharded_model_on_one_device_equals_the_whole_one(tmp_path: Path) -> None:
    rows = sequences(random_rows(8, 0)).to("cuda")
    prompts, settings = [[BOS, *range(3, 3 + i)] for i in range(6)], {"stop_ids": (EOS,), "pad_token_id": PAD}

    def computed(model: Any) -> tuple[torch.Tensor, list[torch.Tensor], list[list[int]]]:
        logps = completion_logps(model, rows)
        logps.sum().backward()
        gradients = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]
        drawn = sample(
            model,
            prompts,
            max_new_tokens=8,
            temperature=1.0,
            seeds=range(6),
            sampler="static",
            **settings,  # type: ignore[arg-type]
        )
        return logps.detach(), gradients, drawn.completions()

    whole = computed(tiny_llama(1, dtype=torch.float32, scale=0.3).cuda())
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_llama(1, dtype=torch.float32, scale=0.3).cuda()
        shard(model, init_device_mesh("cuda", (1,)), Sharding())
        logps, gradients, drawn = computed(model)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(logps, whole[0], rtol=0, atol=1e-4)
    for got, want in zip(gradients, whole[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    assert drawn == whole[2]


def test_samples_of_the_device_are_those_of_the_cpu() -> None:
    """All but those that rounding sends another way."""
    prompts = [[BOS, *range(3, 3 + i % 7)] for i in range(40)]
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "stop_ids": (EOS,), "pad_token_id": PAD}
    for sampler in SAMPLERS:
        drawn = [
            sample(tiny_llama(1, scale=0.3).to(device), prompts, seeds=range(40), sampler=sampler, **settings)
            for device in ("cpu", "cuda")
        ]
        same = sum(a == b for a, b in zip(drawn[0].completions(), drawn[1].completions(), strict=True))
        assert same >= 36


@pytest.mark.parametrize("labels", [None, [1.0, 0.0, 1.0, 0.0]])
def test_health_does_not_wait_for_the_device(labels: list[float] | None) -> None:
    batch = collate(random_pairs(4, 0), range(4), PAD)
    batch = replace(batch, label=None if labels is None else torch.tensor(labels)).to("cuda")
    scored = ScoredBatch(batch, torch.randn(len(batch.sequences.completion_index), VOCAB, device="cuda"))
    assert scored.policy_logps.is_cuda
    expected = completion_health(scored, (EOS,))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = completion_health(scored, (EOS,))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], equal_nan=True)


class Unwaiting(Spied):
    """Of which a step that is not the first may not wait for the device."""

    def training_step(self, window: Any, batch_idx: int) -> None:
        torch.cuda.set_sync_debug_mode("default" if self.global_step == 0 else "error")
        try:
            AlignmentModule.training_step(self, window, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_step_does_not_wait_for_the_device(tmp_path: Path) -> None:
    """Neither the layout of packed rows nor the masks of shared prompts wait, nor the guard of a fused optimizer."""
    module = make_module(
        tiny_llama(1, dtype=torch.float32).train(),
        loss=DPOLoss(),
        reference=FrozenReference(),
        reference_model=tiny_llama(2, dtype=torch.float32),
        log_every_n_steps=10,
        speed=FAST,
        optimizer=partial(torch.optim.AdamW, fused=True),
    )
    module.__class__ = Unwaiting
    trainer = make_trainer(tmp_path, accelerator="gpu", max_steps=4)
    trainer.fit(module, datamodule=make_data(random_pairs(8, 0), max_steps=4))
    assert trainer.global_step == 4


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("fused", [True, False])
def test_bad_step_reaches_neither_weights_nor_state_on_the_device(fused: bool, optimizer: Any, tmp_path: Path) -> None:
    """With a fused optimizer, the host learns of a bad step when the next one has begun."""
    clean = [replace(pair, weight=1.0) for pair in random_pairs(12, 1)]
    pairs = [replace(pair, weight=1e308) if i == 3 else pair for i, pair in enumerate(clean)]

    def train(rows: list[Any], steps: int, max_skipped: int) -> tuple[AlignmentModule, list[torch.Tensor], str]:
        settings = {"optimizer": partial(optimizer, fused=fused), "log_every_n_steps": 100}
        module, error = make_module(tiny_llama(1, dtype=torch.float32), **settings), ""
        callbacks = [NonFinite("skip", max_skipped)] if max_skipped else []
        trainer = make_trainer(tmp_path, accelerator="gpu", max_steps=steps, callbacks=callbacks)
        try:
            trainer.fit(module, datamodule=make_data(rows, max_steps=steps, batch_size=2))
        except NonFiniteError as raised:
            error = str(raised)
        states = [value for one in trainer.optimizers[0].state.values() for value in one.values()]
        found = [*module.policy.parameters(), *(value for value in states if isinstance(value, torch.Tensor))]
        return module, [value.detach().cpu() for value in found], error

    _, stopped, error = train(pairs, 6, 0)
    bad = int(error.partition("of step ")[2].partition(" ")[0])
    assert "the weight 1e+308" in error and bad > 1
    for value, expected in zip(stopped, train(clean, bad - 1, 0)[1], strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    module, skipped, error = train(pairs, 6, 10)
    assert module.global_step == 6 and module.guard.skipped == [bad - 1] and not error
    assert all(value.isfinite().all() for value in skipped)


def test_sampling_and_probe_stay_on_the_device(tmp_path: Path) -> None:
    module = make_module(
        tiny_llama(1, dtype=torch.float32).train(),
        regularizer=GlobalKL(0.1, 1, 4, 4, 5, "unbiased"),
        reference=FrozenReference(),
        reference_model=tiny_llama(2, dtype=torch.float32),
        probe=ProbeSettings(4, 5),
    )
    make_trainer(tmp_path, accelerator="gpu", max_steps=2).fit(
        module, datamodule=make_data(random_pairs(8, 0), max_steps=2)
    )
    assert all(
        gradient.is_cuda and gradient.isfinite().all() for step in module.gradients for gradient in step.values()
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_train_command_on_the_gpu(precision: str, cache: Path, tmp_path: Path) -> None:
    words = (TINY, "trainer=gpu", f"trainer.precision={precision}", "trainer.devices=1")
    metrics = job(tmp_path / "run", cache, *words)
    assert 0 <= metrics["eval/win_rate"] <= 1 and metrics["val/kl"] >= 0
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()


def test_memory_grows_with_completion_tokens_alone() -> None:
    """The vocabulary row of a prompt token never exists: a prompt of 400 tokens costs no logits."""
    vocab = 50_000
    model = tiny_llama(0, dtype=torch.float32, vocab_size=vocab, max_position_embeddings=512).cuda()
    rows = sequences([([5] * 400, [6] * 8)] * 4).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    completion_logps(model, rows)
    whole = 4 * 408 * vocab * 4
    assert torch.cuda.max_memory_allocated() - before < whole / 2


def test_verify_command_on_the_gpu(tmp_path: Path, cache: Path) -> None:
    settings = ["experiment=exact/verify", "model=tiny", "method=spo", "regularizer=none", "alpha=1"]
    settings += ["trainer.accelerator=gpu", "trainer.max_steps=200", "optimizer.lr=3e-3"]
    metrics = job(tmp_path / "run", cache, *settings)
    assert metrics["exact/tv"] <= 0.03
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())
