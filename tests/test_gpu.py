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

from spo.callbacks import NonFinite
from spo.guard import NonFiniteError
from spo.losses import DPOLoss, IPOLoss, PreferenceLoss, SPOLoss
from spo.models import FrozenReference
from spo.module import AlignmentModule
from spo.regularizers import GlobalKL
from spo.sampling import sample
from spo.sampling.static import decode
from spo.watch import ProbeSettings
from tests.commands import TINY, job, shared_cache
from tests.helpers import (
    BOS,
    EOS,
    FAST,
    PAD,
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
