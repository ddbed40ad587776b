"""Collation, windows and the data module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from spo.data import DataError, TokenizedPair
from spo.data.collate import collate
from spo.data.datamodule import PreferenceDataModule
from spo.data.windows import Windows, cut
from spo.types import PreferenceBatch, Window
from tests.helpers import PLAIN


def pair(i: int, **changes: Any) -> TokenizedPair:
    prompt, chosen, rejected = (1, *range(10, 11 + i % 3)), (50 + i, 2), (90 + i, 60, 2)
    return replace(TokenizedPair(prompt, chosen, rejected, "", "", "", f"{i}"), **changes)


PAIRS = [pair(i) for i in range(11)]


# ------------------------------------------------------------------------------------------------------- collate


@pytest.mark.parametrize("pad", [0, 1, 2])
def test_collate_golden(pad: int) -> None:
    # The padding id may be that of BOS (1) or EOS (2): masks go by position.
    batch = collate([PAIRS[0], PAIRS[2]], [0, 2], pad)
    p = pad
    assert batch.sequences.input_ids.tolist() == [
        [1, 10, 50, 2, p, p, p],
        [1, 10, 11, 12, 52, 2, p],
        [1, 10, 90, 60, 2, p, p],
        [1, 10, 11, 12, 92, 60, 2],
    ]
    assert batch.sequences.input_ids.dtype == torch.int64
    assert batch.sequences.completion_mask.int().tolist() == [
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1],
    ]
    assert batch.sequences.completion_length.tolist() == [2, 2, 3, 3]
    assert batch.index.tolist() == [0, 2] and len(batch) == 2
    assert batch.preference is None and batch.weight is None and batch.reference_logps is None


def test_collate_preferences_weights_references_and_single_completions() -> None:
    pairs = [pair(0, preference=0.75), pair(1, weight=2.0), pair(2)]
    reference = torch.arange(22.0).reshape(11, 2)
    batch = collate(pairs, [4, 0, 9], 0, reference)
    assert batch.preference is not None and batch.preference.tolist() == [0.75, 1, 1]
    assert batch.weight is not None and batch.weight.tolist() == [1, 2, 1]
    assert batch.reference_logps is not None and batch.reference_logps.tolist() == [8, 0, 18, 9, 1, 19]
    single = [replace(p, rejected_ids=None) for p in pairs]
    alone = collate(single, [4, 0, 9], 0, reference[:, :1])
    assert len(alone.sequences) == 3
    assert alone.reference_logps is not None and alone.reference_logps.tolist() == [8, 0, 18]
    with pytest.raises(ValueError, match="in all of its pairs, or in none"):
        collate([single[0], pairs[1]], [0, 1], 0)


# ------------------------------------------------------------------------------------------------------- windows


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 5),
    micro=st.one_of(st.none(), st.integers(1, 8)),
    seed=st.integers(0, 3),
)
def test_windows_partition_each_epoch(n: int, batch_size: int, world_size: int, micro: int | None, seed: int) -> None:
    if min(n, batch_size) < world_size:
        with pytest.raises(ValueError, match=f"cannot be dealt to {world_size} devices"):
            Windows(n, batch_size, seed, world_size)
        return
    windows = Windows(n, batch_size, seed, world_size)
    left_out = n % batch_size if n % batch_size < world_size else 0
    for epoch in range(2):
        steps = range(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch)
        seen = np.concatenate([windows.window(step) for step in steps])
        assert len(seen) == len(set(seen.tolist())) == n - left_out and set(seen.tolist()) <= set(range(n))
        assert all(len(windows.window(step)) == batch_size for step in steps[:-1])
        for step in steps:
            ranks = [windows.micro_batches(step, rank, micro) for rank in range(world_size)]
            dealt = [i for micro_batches in ranks for indices in micro_batches for i in indices.tolist()]
            assert sorted(dealt) == sorted(windows.window(step).tolist())
            # Sharded models need the same number of forward passes on every device, none of them empty.
            assert len({len(micro_batches) for micro_batches in ranks}) == 1
            sizes = [len(indices) for micro_batches in ranks for indices in micro_batches]
            assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
            share = -(-len(windows.window(step)) // world_size)
            even = len(windows.window(step)) % world_size == 0
            assert max(sizes) <= (share if micro is None else micro + (not even))


def test_the_order_is_a_pure_function_of_seed_and_step() -> None:
    windows = Windows(100, 7, 5, 2)
    again = Windows(100, 7, 5, 2)
    assert [again.window(step).tolist() for step in (40, 3, 17)] == [
        windows.window(step).tolist() for step in (40, 3, 17)
    ]
    first, second = (np.concatenate([windows.window(e * 15 + i) for i in range(15)]).tolist() for e in (0, 1))
    assert first != second and first != sorted(first)
    assert Windows(100, 7, 6, 2).window(0).tolist() != windows.window(0).tolist()
    # The same windows on any number of devices.
    assert Windows(100, 7, 5, 1).window(20).tolist() == windows.window(20).tolist()
    # A ragged window too small for the devices is left out: 100 = 14 * 7 + 2.
    assert (Windows(100, 7, 5, 2).per_epoch, Windows(100, 7, 5, 3).per_epoch) == (15, 14)


def test_cut_is_even() -> None:
    indices = np.arange(5)
    assert [b.tolist() for b in cut(indices, 0, 2, 1)] == [[0, 2], [4]]
    assert [b.tolist() for b in cut(indices, 1, 2, 1)] == [[1], [3]]
    assert [len(b) for b in cut(np.arange(10), 0, 1, 4)] == [4, 3, 3]


# --------------------------------------------------------------------------------------------------- data module


def module_of(max_steps: int, **changes: Any) -> PreferenceDataModule:
    options: dict[str, Any] = {
        "train": PAIRS,
        "selection": PAIRS[:7],
        "batch_size": 4,
        "micro_batch_size": 3,
        "eval_batch_size": 3,
        "seed": 0,
        "num_workers": 0,
        "pad_token_id": 0,
        "max_steps": max_steps,
    }
    return PreferenceDataModule(**{**options, **changes})


class FakeTrainer:
    def __init__(self, world_size: int = 1, global_rank: int = 0, global_step: int = 0) -> None:
        self.world_size, self.global_rank, self.global_step = world_size, global_rank, global_step
        self.lightning_module = SimpleNamespace(speed=PLAIN)


def served(data: PreferenceDataModule, **trainer: int) -> tuple[list[Window], list[PreferenceBatch]]:
    data.trainer = FakeTrainer(**trainer)  # type: ignore[assignment]
    return list(data.train_dataloader()), list(data.val_dataloader())


def indices(window: Window) -> list[list[int]]:
    return [batch.index.tolist() for batch in window]


def test_windows_over_ranks_make_the_windows_of_one_device() -> None:
    alone, _ = served(module_of(8))
    both = [served(module_of(8), world_size=2, global_rank=rank)[0] for rank in (0, 1)]
    assert [window.num_pairs for window in alone] == [4, 4, 3, 4, 4, 3, 4, 4]
    for whole, *parts in zip(alone, *both, strict=True):
        dealt = [i for part in parts for micro_batch in indices(part) for i in micro_batch]
        assert sorted(dealt) == sorted(i for micro_batch in indices(whole) for i in micro_batch)
        assert {part.num_pairs for part in parts} == {whole.num_pairs}
    batch = alone[0].micro_batches[0]
    expected = collate([PAIRS[i] for i in batch.index.tolist()], batch.index.tolist(), 0)
    assert torch.equal(batch.sequences.input_ids, expected.sequences.input_ids)


def test_a_resumed_run_is_served_the_tail() -> None:
    whole, _ = served(module_of(8))
    data = module_of(8)
    tail, _ = served(data, global_step=5)
    assert [indices(window) for window in tail] == [indices(window) for window in whole[5:]]
    # Lightning adds the steps already done to its own count, so the length is that of the whole run.
    assert len(data.train_dataloader()) == 8


def test_workers_change_nothing() -> None:
    whole, validation = served(module_of(5))
    others, other_validation = served(module_of(5, num_workers=2))
    assert [indices(window) for window in others] == [indices(window) for window in whole]
    assert [b.index.tolist() for b in other_validation] == [b.index.tolist() for b in validation]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_validation_sees_each_pair_once(world_size: int, size: int) -> None:
    ranks = [
        served(module_of(1, batch_size=7, eval_batch_size=size), world_size=world_size, global_rank=rank)[1]
        for rank in range(world_size)
    ]
    assert sorted(i for rank in ranks for batch in rank for i in batch.index.tolist()) == list(range(7))
    assert len({len(rank) for rank in ranks}) == 1
    if world_size == 1:
        assert [i for batch in ranks[0] for i in batch.index.tolist()] == list(range(7))


def test_reference_logps_follow_their_pairs() -> None:
    reference = {"train": torch.arange(22.0).reshape(11, 2), "selection": torch.arange(14.0).reshape(7, 2) + 100}
    train, validation = served(module_of(3, reference_logps=reference))
    for split, batches in (("train", [b for window in train for b in window]), ("selection", validation)):
        for batch in batches:
            assert batch.reference_logps is not None
            assert batch.reference_logps.tolist() == reference[split][batch.index].T.flatten().tolist()


def test_arguments_are_checked() -> None:
    for name in ("batch_size", "micro_batch_size", "eval_batch_size"):
        with pytest.raises(DataError, match=rf"data\.{name}=0: must be at least 1"):
            module_of(1, **{name: 0})
    with pytest.raises(DataError, match="no pair to train on"):
        module_of(1, train=[])
    with pytest.raises(DataError, match="7 selection pairs cannot be dealt to 8 devices"):
        data = module_of(1, batch_size=8)
        data.trainer = FakeTrainer(8, 0, 0)  # type: ignore[assignment]
        data.val_dataloader()
    with pytest.raises(RuntimeError, match="serves a Trainer"):
        module_of(1).train_dataloader()


class Recorder(LightningModule):
    """Records what the trainer hands to it, with one manual optimiser step per window."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.speed = PLAIN
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, window: Window, batch_idx: int) -> None:
        self.seen.append(indices(window))
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight.sum())
        optimizer.step()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self.validated += batch.index.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_in_a_real_trainer_and_resumed(tmp_path: Path) -> None:
    def fit(steps: int, checkpoint: Path | None = None) -> tuple[Recorder, Trainer]:
        module = Recorder()
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, datamodule=module_of(steps), ckpt_path=checkpoint, weights_only=False)
        return module, trainer

    whole, _ = fit(8)
    assert whole.seen == [indices(window) for window in served(module_of(8))[0]]
    assert whole.validated == list(range(7)) * 4
    first, trainer = fit(5)
    assert len(first.seen) == 5
    trainer.save_checkpoint(tmp_path / "at5.ckpt")
    rest, trainer = fit(8, tmp_path / "at5.ckpt")
    assert first.seen + rest.seen == whole.seen
    assert trainer.global_step == 8
