"""References that move, and references that do not say so: the weights are watched, and the store stays right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from spo.callbacks import Checkpoint
from spo.data.logps_store import LogpsStore
from spo.errors import UserError
from spo.losses import DPOLoss
from spo.models import AdapterOffReference, CachedReference, FrozenReference, LoraSettings, Reference
from spo.models.fingerprint import fingerprint
from spo.regularizers import GlobalKL
from tests.helpers import Spied, make_data, make_module, make_trainer, model_spec, random_pairs, save_model, tiny_llama

PAIRS = random_pairs(12, seed=0)


class TrustRegionReference(FrozenReference):
    """The reference of TR-DPO (Gorbatovski et al. 2024): it follows the policy by a share of the way, every few steps.

    Args:
        every: Optimizer steps between two updates.
        share: Share of the way to the policy; 1 copies the policy ("hard"), less is a mean of both ("soft").
    """

    moves = True

    def __init__(self, every: int = 1, share: float = 1.0) -> None:
        super().__init__()
        self.every, self.share = every, share

    @torch.no_grad()
    def after_step(self, policy: nn.Module, step: int) -> None:
        assert self.model is not None
        if step % self.every == 0:
            for ours, theirs in zip(self.model.parameters(), policy.parameters(), strict=True):
                ours.lerp_(theirs, self.share)


# --- the fingerprint -----------------------------------------------------------------------------------------------


def one_bit(weight: Tensor) -> None:
    bits = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    bits.view(-1)[bits.numel() // 2] ^= 1


def swap_rows(weight: Tensor) -> None:
    weight.copy_(weight.flip(0))


def swap_columns(weight: Tensor) -> None:
    weight.copy_(weight.flip(-1))


CHANGES: list[Callable[[Tensor], Any]] = [one_bit, swap_rows, swap_columns, Tensor.neg_, Tensor.zero_]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 8), (3, 5), (2, 3, 4), (7,)], ids=str)
def test_fingerprint_notices_every_change(change: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, dtype=dtype, generator=generator) for size in ((4,), shape)]
    before = fingerprint(weights)
    version = weights[1]._version
    change(weights[1].data)
    assert fingerprint(weights) != before
    assert weights[1]._version == version  # what PyTorch counts would not tell


def test_fingerprint_does_not_depend_on_the_layout() -> None:
    weight = torch.randn(6, 8)
    assert fingerprint([weight.T.contiguous().T]) == fingerprint([weight]) == fingerprint([weight.clone()])
    assert fingerprint([torch.tensor(3), torch.tensor([True, False])]) is not None
    assert fingerprint([]) is None


# --- references that do not say that they move ----------------------------------------------------------------------


class Moves(Callback):
    """Changes the reference at a hook of the Trainer.

    Args:
        hook: Name of the hook.
        change: Function of the module.
    """

    def __init__(self, hook: str, change: Callable[[Spied], None]) -> None:
        self.change = change
        setattr(self, hook, self._move)

    def _move(self, trainer: Any, module: Spied, *args: Any, **kwargs: Any) -> None:
        self.change(module)


def scale(module: Spied) -> None:
    for parameter in model_of(module).parameters():
        parameter.data.mul_(1.01)


def copy_policy(module: Spied) -> None:
    model_of(module).load_state_dict(module.policy.state_dict())


def replace(module: Spied) -> None:
    module.reference.model = copy.deepcopy(model_of(module))  # type: ignore[attr-defined]
    scale(module)


def model_of(module: Spied) -> nn.Module:
    model = module.reference.model  # type: ignore[attr-defined]
    assert isinstance(model, nn.Module)
    return model


def cached(file: Path) -> CachedReference:
    reference = CachedReference("unused")
    reference.store = LogpsStore(file, torch.float64)
    return reference


def fit(
    folder: Path, reference: Reference, *callbacks: Callback, steps: int = 4, validates: bool = True, **changes: Any
) -> tuple[Spied, list[float]]:
    """Train with DPO, two steps per epoch; return the module and the loss of each step."""
    module = make_module(
        tiny_llama(0, scale=0.2),
        loss=DPOLoss(),
        reference=reference,
        reference_model=tiny_llama(1, scale=0.2),
        beta=1.0,
        lr=0.05,
    )
    losses: list[float] = []
    kept = module.train_metrics.update

    def update(values: Any) -> None:
        losses.extend([float(values["loss"])] if "loss" in values else [])
        kept(values)

    module.train_metrics.update = update  # type: ignore[method-assign]
    data = make_data(PAIRS[:8], PAIRS[8:] if validates else [], max_steps=steps, batch_size=4)
    settings = {"val_check_interval": 2} if validates else {"limit_val_batches": 0}
    resume = changes.pop("resume", None)
    trainer = make_trainer(folder, max_steps=steps, callbacks=list(callbacks), **settings, **changes)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, losses


WORDS = r"^reference: the weights of this \w+ changed during training, .* reference\._target_=MODULE\.CLASS$"


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of a run whose reference does not move."""
    return fit(tmp_path_factory.mktemp("right"), FrozenReference())[1]


@pytest.mark.parametrize(
    ("hook", "change"),
    [
        ("setup", scale),
        ("on_train_start", copy_policy),
        ("on_train_batch_end", copy_policy),
        ("on_train_batch_end", replace),
        ("on_validation_end", scale),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("kind", ["frozen", "cold", "warm"])
def test_reference_that_a_callback_moves_is_an_error(
    kind: str, hook: str, change: Any, right: list[float], tmp_path: Path
) -> None:
    file = tmp_path / "store.sqlite"
    if kind == "warm":
        fit(tmp_path, cached(file))
    stored = _stored(file)
    with pytest.raises(UserError, match=WORDS):
        fit(tmp_path, FrozenReference() if kind == "frozen" else cached(file), Moves(hook, change))
    if kind == "warm":
        assert _stored(file) == stored
    if kind == "cold":  # What was stored before the change is what a run with the same reference finds.
        assert fit(tmp_path, cached(file))[1] == pytest.approx(right, abs=1e-6)


def _stored(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


@pytest.mark.parametrize("warm", [False, True])
def test_run_without_validations_does_not_end_with_a_moved_reference(warm: bool, tmp_path: Path) -> None:
    file = tmp_path / "store.sqlite"
    if warm:
        fit(tmp_path, cached(file), validates=False)
    ended: list[str] = []

    class Ends(Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            ended.append("fit")

    with pytest.raises(UserError, match=WORDS):
        fit(tmp_path, cached(file), Moves("on_train_batch_end", copy_policy), Ends(), validates=False)
    assert not ended


def test_checkpoint_of_a_moved_reference_is_not_written(tmp_path: Path) -> None:
    def move_and_save(module: Spied) -> None:
        scale(module)
        module.trainer.save_checkpoint(tmp_path / "moved.ckpt")

    with pytest.raises(UserError, match=WORDS):
        fit(tmp_path, FrozenReference(), Moves("on_train_batch_end", move_and_save))
    assert not (tmp_path / "moved.ckpt").exists()


def test_ordinary_runs_are_not_disturbed(tmp_path: Path) -> None:
    saver = Checkpoint(str(tmp_path / "checkpoints"), "val/loss", "min")
    reference = FrozenReference()
    fit(tmp_path, reference, saver, enable_checkpointing=True)
    assert reference.state_dict() == {}
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any("reference" in key and value for key, value in state.items())


@pytest.mark.parametrize("kind", ["fresh", "given"])
def test_adapter_that_is_the_reference_is_watched(kind: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", scale=0.2)
    lora = LoraSettings(r=2, alpha=4.0, dropout=0.0, target_modules="all-linear")
    given: Any = model_spec(lora=lora).policy(folder, seed=0)
    given.save_pretrained(tmp_path / "given")
    spec = model_spec(lora=lora, adapter_path=str(tmp_path / "given") if kind == "given" else None)

    def module() -> Spied:
        return make_module(spec.policy(folder, seed=0), loss=DPOLoss(), reference=AdapterOffReference(), lr=0.5)

    def move(module: Spied) -> None:
        named = dict(module.policy.named_parameters())
        part = ".reference." if kind == "given" else ".base_layer."
        next(weight for name, weight in named.items() if part in name).data.add_(0.1)

    for callbacks in ([], [Moves("on_train_batch_end", move)]):
        trainer = make_trainer(tmp_path, max_steps=2, callbacks=callbacks)
        data = make_data(PAIRS[:8], max_steps=2)
        if callbacks:
            with pytest.raises(UserError, match=WORDS):
                trainer.fit(module(), datamodule=data)
        else:
            trainer.fit(module(), datamodule=data)


# --- references that say that they move -----------------------------------------------------------------------------


def test_moving_reference_follows_the_policy_and_resumes(tmp_path: Path) -> None:
    module, losses = fit(tmp_path, TrustRegionReference(every=1, share=1.0))
    policy = dict(module.policy.named_parameters())
    assert all(torch.equal(weight, policy[name]) for name, weight in model_of(module).named_parameters())
    # The reference of every step after the first is the policy itself.
    assert losses[0] != losses[1] and losses[1:] == pytest.approx([0.6931] * 3, abs=1e-4)

    straight, losses = fit(tmp_path, TrustRegionReference(every=2, share=0.5))
    saver = Checkpoint(str(tmp_path / "checkpoints"), "val/loss", "min")
    fit(tmp_path, TrustRegionReference(every=2, share=0.5), saver, steps=3, enable_checkpointing=True)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    resumed, rest = fit(tmp_path, TrustRegionReference(every=2, share=0.5), resume=last)
    assert rest == losses[-len(rest) :] and len(set(losses)) == 4
    for ours, theirs in ((resumed.policy, straight.policy), (model_of(resumed), model_of(straight))):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_buffered_samples_are_scored_by_the_reference_as_it_is(share: float, tmp_path: Path) -> None:
    module = make_module(
        tiny_llama(0, scale=0.2),
        regularizer=GlobalKL(
            weight=1.0,
            prompts="train",
            estimator="tokenwise",
            refresh_every=4,
            num_samples=4,
            batch_size=4,
            max_new_tokens=6,
        ),
        reference=TrustRegionReference(share=share),
        reference_model=tiny_llama(1, scale=0.2),
        lr=0.05,
    )
    found: list[float] = []
    kept = module.train_metrics.update

    def update(values: Any) -> None:
        found.extend([float(values["loss/regularizer"].mean())] if "loss/regularizer" in values else [])
        kept(values)

    module.train_metrics.update = update  # type: ignore[method-assign]
    make_trainer(tmp_path, max_steps=3).fit(module, datamodule=make_data(PAIRS, max_steps=3))
    # Once the reference is the policy, the KL of the same samples is zero.
    assert found[0] > 0.1 and all((value < 1e-6) == (share == 1.0) for value in found[1:])
