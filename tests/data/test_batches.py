"""Collation, windows and the data module."""

from __future__ import annotations

import itertools
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
from torch import Tensor

from spo.batching import even_batches, fewest_batches
from spo.data import DataError, TokenizedPair
from spo.data.collate import collate
from spo.data.datamodule import PreferenceDataModule, pair_tokens
from spo.data.windows import Windows, deal_micro_batches
from spo.forward.speed import Speed
from spo.types import PreferenceBatch, Window
from tests.helpers import FAST, PLAIN


def pair(i: int, **changes: Any) -> TokenizedPair:
    prompt, chosen, rejected = (1, *range(10, 11 + i % 3)), (50 + i, 2), (90 + i, 60, 2)
    return replace(TokenizedPair(prompt, chosen, rejected, "", "", "", f"{i}"), **changes)


PAIRS = [pair(i) for i in range(11)]


# ------------------------------------------------------------------------------------------------------- collate


@pytest.mark.parametrize("pad", [0, 1, 2])
def test_collate_pads_and_shares_sequences(pad: int) -> None:
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


def test_collate_handles_preferences_weights_references_and_single_completions() -> None:
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


def test_batch_without_pairs_has_their_sequences() -> None:
    pairs = [pair(i, preference=0.5, weight=2.0, features={"score": 0.1}) for i in range(2)]
    batch = collate(pairs, [0, 1], 0, torch.arange(4.0).reshape(2, 2))
    empty = batch.without_pairs()
    assert len(empty) == 0 and torch.equal(empty.sequences.input_ids, batch.sequences.input_ids)
    assert empty.mask().shape == (2, 0) and empty.mean_per_pair(torch.ones(4)).tolist() == []
    assert empty.preference is not None and empty.weight is not None
    assert len(empty.preference) == len(empty.weight) == len(empty.features["score"]) == 0


# ------------------------------------------------------------------------------------------------------- windows


def some_windows(
    n: int, batch_size: int, seed: int, world_size: int, group: int | None = None, padded: bool = False
) -> Windows:
    """Return windows of ``n`` random pairs of 4 to 60 tokens; if padded, of lists of 1 to 4 completions."""
    generator = np.random.default_rng(n)
    lengths = generator.integers(4, 61, n)
    sizes = generator.integers(1, 5, n) if padded else lengths + generator.integers(2, lengths + 1)
    return Windows(lengths, sizes, padded, batch_size, seed, world_size, group)


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 5),
    max_pairs=st.one_of(st.none(), st.integers(1, 8)),
    max_tokens=st.one_of(st.none(), st.integers(1, 400)),
    seed=st.integers(0, 3),
    group=st.one_of(st.none(), st.integers(2, 5)),
    padded=st.booleans(),
)
def test_windows_partition_each_epoch(
    n: int,
    batch_size: int,
    world_size: int,
    max_pairs: int | None,
    max_tokens: int | None,
    seed: int,
    group: int | None,
    padded: bool,
) -> None:
    if batch_size < world_size:
        with pytest.raises(ValueError, match=f"cannot be dealt to {world_size} devices"):
            some_windows(n, batch_size, seed, world_size, group, padded)
        return
    windows = some_windows(n, batch_size, seed, world_size, group, padded)
    for epoch in range(2):
        steps = range(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch)
        seen = np.concatenate([windows.window(step) for step in steps])
        assert sorted(seen.tolist()) == list(range(n))
        assert all(len(windows.window(step)) == batch_size for step in steps[:-1])
        for step in steps:
            ranks = [windows.micro_batches(step, rank, max_pairs, max_tokens) for rank in range(world_size)]
            dealt = [i for micro_batches in ranks for indices in micro_batches for i in indices.tolist()]
            assert sorted(dealt) == sorted(windows.window(step).tolist())
            # Sharded models need the same number of forward passes on every device, none of them empty without need.
            assert len({len(micro_batches) for micro_batches in ranks}) == 1
            is_small = len(windows.window(step)) < world_size
            assert all(len(indices) or is_small for micro_batches in ranks for indices in micro_batches)
            # A device with a pair more than others may have too few batches for one each; else the limits hold.
            smallest = len(windows.window(step)) // world_size
            for micro_batches in ranks:
                squeezed = len(micro_batches) == smallest < sum(map(len, micro_batches))
                over = [i for i in micro_batches if exceeds(windows, i, max_pairs, max_tokens)]
                assert len(over) <= squeezed and all(len(indices) == 2 for indices in over if squeezed)


def exceeds(windows: Windows, batch: Any, max_pairs: int | None, max_tokens: int | None) -> bool:
    """Return whether a micro-batch of several pairs exceeds a limit."""
    if len(batch) < 2:
        return False
    too_many = max_pairs is not None and len(batch) > max_pairs
    tokens = windows.sizes[batch].sum() * (windows.lengths[batch].max() if windows.padded else 1)
    return too_many or (max_tokens is not None and tokens > max_tokens)


@pytest.mark.parametrize("group", [None, 3])
def test_order_depends_on_seed_and_step_only(group: int | None) -> None:
    windows, again = some_windows(100, 7, 5, 2, group), some_windows(100, 7, 5, 2, group)
    assert [again.window(step).tolist() for step in (40, 3, 17)] == [
        windows.window(step).tolist() for step in (40, 3, 17)
    ]
    first, second = (np.concatenate([windows.window(e * 15 + i) for i in range(15)]).tolist() for e in (0, 1))
    assert first != second and first != sorted(first)
    assert some_windows(100, 7, 6, 2, group).window(0).tolist() != windows.window(0).tolist()
    # The same windows on any number of devices.
    assert some_windows(100, 7, 5, 1, group).window(20).tolist() == windows.window(20).tolist()
    # A last window with fewer pairs than devices is a step too: 100 = 14 * 7 + 2.
    assert windows.per_epoch == some_windows(100, 7, 5, 3, group).per_epoch == 15


def padding(windows: Windows, limits: tuple[int | None, int | None] = (None, None)) -> float:
    """Return the share of padding in an epoch, for pairs whose two sequences are equally long."""
    lengths, cells = windows.lengths, 0
    for step in range(windows.per_epoch):
        cells += sum(len(batch) * int(lengths[batch].max()) for batch in windows.micro_batches(step, 0, *limits))
    return 1 - float(lengths.sum()) / cells


def test_grouping_puts_similar_lengths_into_windows_and_micro_batches() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 960)
    apart, together = (Windows(lengths, 2 * lengths, False, 16, 0, 1, group) for group in (None, 30))
    assert padding(apart) > 0.4 and padding(together) < 0.03
    assert padding(Windows(lengths, 2 * lengths, False, 16, 0, 1, 2)) < 0.35
    assert padding(apart, (4, None)) < 0.2
    # The epoch does not go from short to long, as the windows of a sorted group would.
    means = [lengths[together.window(step)].mean() for step in range(60)]
    assert abs(np.corrcoef(means, np.arange(60))[0, 1]) < 0.3


def test_grouped_pairs_are_in_each_window_with_equal_probability() -> None:
    # 3 groups of two windows, one of a single window, and a ragged one; lengths from shortest to longest.
    n, batch_size, epochs = 30, 4, 6000
    windows = Windows(np.arange(n), np.arange(n), False, batch_size, 11, 1, 2)
    counts = np.zeros((n, windows.per_epoch))
    for step in range(epochs * windows.per_epoch):
        counts[windows.window(step), step % windows.per_epoch] += 1
    expected = np.full((n, windows.per_epoch), epochs * batch_size / n)
    expected[:, -1] = epochs * (n % batch_size) / n
    # Each row is a multinomial of its own: chi-square with (n - 1)(windows - 1) degrees of freedom, as both sums of
    # the table are fixed, within four standard deviations of its mean.
    freedom = (n - 1) * (windows.per_epoch - 1)
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)
    # And for each pair: 7 degrees of freedom, whose 99.99% quantile is 29.9.
    assert ((counts - expected) ** 2 / expected).sum(1).max() < 29.9


def test_expected_mean_of_a_grouped_window_is_the_mean_of_the_data() -> None:
    values = np.random.default_rng(1).normal(size=20) + np.arange(20)  # a "gradient" that grows with length
    windows = Windows(np.arange(20), np.arange(20), False, 4, 3, 1, 5)
    for position in (0, 2, 4):
        means = [values[windows.window(epoch * 5 + position)].mean() for epoch in range(3000)]
        assert abs(np.mean(means) - values.mean()) < 4 * np.std(means) / np.sqrt(3000)


def test_deal_micro_batches_matches_examples() -> None:
    def cuts(lengths: list[int], rank: int, world: int, *most: int | None) -> list[list[int]]:
        return [b.tolist() for b in deal_micro_batches(np.array(lengths), np.array(lengths), False, rank, world, *most)]

    assert cuts([5, 5, 5, 5, 5], 0, 2, 1, None) == [[0, 2], [4]]  # as many batches as the other device
    assert cuts([5, 5, 5, 5, 5], 1, 2, 1, None) == [[1], [3]]
    assert cuts([3, 9, 4, 8], 0, 1, None, None) == [[1, 3, 2, 0]]  # the longest first
    assert cuts([3, 9, 4, 8], 0, 1, 2, None) == [[1, 3], [2, 0]]
    assert cuts([3, 9, 4, 8], 0, 1, None, 12) == [[1], [3], [2, 0]]
    assert cuts([3, 9, 4, 8], 0, 1, None, 15) == [[1], [3, 2, 0]]  # two batches of 9 and 15, not of 17 and 7
    assert cuts([3, 90, 4, 8], 0, 1, None, 15) == [[1], [3, 2, 0]]  # what exceeds the limit is alone
    assert cuts([3, 9, 4, 8], 0, 1, 2, 15) == [[1], [3], [2, 0]]  # both limits hold
    assert cuts([50, 90, 60, 8, 7, 6, 5], 0, 1, None, 15) == [
        [1],
        [2],
        [0],
        [3, 4],
        [5, 6],
    ]  # among others
    assert cuts([90, 3, 4, 1], 0, 2, None, 20) == [[0], [1]] and cuts([90, 3, 4, 1], 1, 2, None, 20) == [[2], [3]]
    assert cuts([9, 8, 7], 0, 2, None, 10) == [[0, 2]] and cuts([9, 8, 7], 1, 2, None, 10) == [[1]]  # one too many


@settings(max_examples=200, deadline=None)
@given(
    items=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 30)), min_size=1, max_size=9),
    most=st.one_of(st.none(), st.integers(1, 4)),
    max_tokens=st.one_of(st.none(), st.integers(1, 60)),
)
def test_even_batches_are_optimal_among_all_cuts(
    items: list[tuple[int, int]], most: int | None, max_tokens: int | None
) -> None:
    """Compare with the best of all ways to cut."""
    items = sorted(items, key=lambda item: -item[0])
    n, best = len(items), {}

    def tokens(batch: list[tuple[int, int]]) -> int:
        return max(width for width, _ in batch) * sum(size for _, size in batch)

    for cuts in itertools.product([False, True], repeat=n - 1):
        ends = [0, *(i + 1 for i, here in enumerate(cuts) if here), n]
        parts = [items[a:b] for a, b in itertools.pairwise(ends)]
        largest = max((tokens(part) for part in parts if len(part) > 1), default=0)
        if max(map(len, parts)) <= (most or n) and (max_tokens is None or largest <= max_tokens):
            best[len(parts)] = min(best.get(len(parts), largest), largest)
    fewest = fewest_batches(items, most, max_tokens)
    assert fewest == min(best)
    for count in range(fewest, n + 1):
        batches = even_batches(items, count, most)
        assert [i for batch in batches for i in range(n)[batch]] == list(range(n)) and len(batches) == count
        assert max(len(items[batch]) for batch in batches) <= (most or n)
        several = [tokens(items[batch]) for batch in batches if len(items[batch]) > 1]
        assert max(several, default=0) == best[count]


# --------------------------------------------------------------------------------------------------- data module


def module_of(max_steps: int, **changes: Any) -> PreferenceDataModule:
    options: dict[str, Any] = {
        "train": PAIRS,
        "selection": PAIRS[:7],
        "batch_size": 4,
        "micro_batch_size": 3,
        "micro_batch_tokens": None,
        "eval_batch_size": 3,
        "group_by_length": None,
        "seed": 0,
        "num_workers": 0,
        "pad_token_id": 0,
        "max_steps": max_steps,
    }
    return PreferenceDataModule(**{**options, **changes})


class FakeTrainer:
    def __init__(self, world_size: int = 1, global_rank: int = 0, global_step: int = 0, speed: Speed = PLAIN) -> None:
        self.world_size, self.global_rank, self.global_step = world_size, global_rank, global_step
        self.lightning_module = SimpleNamespace(speed=speed)
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))


def served(data: PreferenceDataModule, **trainer: Any) -> tuple[list[Window], list[PreferenceBatch]]:
    data.trainer = FakeTrainer(**trainer)  # type: ignore[assignment]
    return list(data.train_dataloader()), list(data.val_dataloader())


def indices(window: Window) -> list[list[int]]:
    return [batch.index.tolist() for batch in window]


def test_windows_of_all_ranks_join_to_those_of_one_device() -> None:
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


def test_resumed_run_gets_the_remaining_windows() -> None:
    whole, _ = served(module_of(8))
    data = module_of(8)
    tail, _ = served(data, global_step=5)
    assert [indices(window) for window in tail] == [indices(window) for window in whole[5:]]
    # Lightning adds the steps already done to its own count, so the length is that of the whole run.
    assert len(data.train_dataloader()) == 8


def test_worker_processes_do_not_change_batches() -> None:
    whole, validation = served(module_of(5))
    others, other_validation = served(module_of(5, num_workers=2))
    assert [indices(window) for window in others] == [indices(window) for window in whole]
    assert [b.index.tolist() for b in other_validation] == [b.index.tolist() for b in validation]


def test_pair_tokens_counts_tokens_that_the_model_computes() -> None:
    ranked = pair(2, worse_ids=((7, 8, 9, 2),))
    assert pair_tokens(pair(2), share_prompts=False) == 2 * 4 + 2 + 3
    assert pair_tokens(pair(2), share_prompts=True) == 4 + 2 + 3
    assert pair_tokens(ranked, share_prompts=False) == 3 * 4 + 2 + 3 + 4
    assert pair_tokens(replace(pair(2), rejected_ids=None), share_prompts=True) == 4 + 2


SETTLED = replace(FAST, probed=True)


@pytest.mark.parametrize("speed", [PLAIN, FAST, SETTLED, replace(SETTLED, share_prompts=False)])
def test_token_limit_holds_in_training_and_validation(speed: Speed) -> None:
    pairs = [pair(i, prompt_ids=(1, 100 + i, *[9] * (i % 3))) for i in range(11)]  # no two prompts are the same
    limits = {"micro_batch_size": None, "eval_batch_size": 7, "micro_batch_tokens": 30}
    data = module_of(6, train=pairs, selection=pairs[:7], **limits)
    train, validation = served(data, speed=speed)
    computed = [batch.sequences for batch in [*(batch for window in train for batch in window), *validation]]
    sizes = [(s.input_ids if s.packed is None else s.packed.input_ids).numel() for s in computed]
    assert max(sizes) <= 30 and len({len(sequences) for sequences in computed}) > 1
    assert {s.packed is not None for s in computed} == {speed.probed}
    alone, _ = served(module_of(6, micro_batch_tokens=1))
    assert {len(batch) for window in alone for batch in window} == {1}


def test_window_is_pinned_and_transferred_without_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = replace(FAST, probed=True)
    data = module_of(1, reference_logps={"train": torch.zeros(11, 2)})
    [window], _ = served(data, speed=speed)
    batch = window.micro_batches[0]
    assert batch.sequences.packed is not None
    pinned: list[Tensor] = []
    moves: list[tuple[Any, bool]] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor

    def to(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        moves.append((device, non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    moved = data.transfer_batch_to_device(window, cuda, 0)
    assert isinstance(moved, Window) and moved.num_pairs == window.num_pairs
    kept = moved.micro_batches[0]
    assert kept.keys == batch.keys and kept.sequences.packed is not None
    assert kept.sequences.packed.groups is batch.sequences.packed.groups
    # of a batch ids, lengths and places, of its packed row the same, and what belongs to the pairs
    expected = [batch.sequences.input_ids, batch.sequences.packed.predictors, batch.index, batch.reference_logps]
    assert all(any(found is tensor for found in pinned) for tensor in expected)
    assert moves == [(cuda, True)] * len(pinned) and len(pinned) == 10 * len(window.micro_batches)
    moves.clear()
    pinned.clear()
    data.transfer_batch_to_device(window, cpu, 0)
    assert not pinned and set(moves) == {(cpu, False)}
    data.trainer.strategy.root_device = cuda  # type: ignore[union-attr]
    assert data.train_dataloader().pin_memory and data.val_dataloader().pin_memory  # type: ignore[union-attr]


def test_grouped_windows_are_loaded_and_resumed() -> None:
    long = [pair(i, chosen_ids=(*[50] * (i * 7 % 11), 2)) for i in range(11)]
    whole, _ = served(module_of(9, train=long, group_by_length=2))
    tail, _ = served(module_of(9, train=long, group_by_length=2, num_workers=2), global_step=5)
    assert [indices(window) for window in tail] == [indices(window) for window in whole[5:]]
    assert [indices(window) for window in whole] != [indices(w) for w in served(module_of(9, train=long))[0]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_validation_sees_each_pair_once(world_size: int, size: int) -> None:
    ranks = [
        served(module_of(1, batch_size=9, eval_batch_size=size), world_size=world_size, global_rank=rank)[1]
        for rank in range(world_size)
    ]
    assert sorted(i for rank in ranks for batch in rank for i in batch.index.tolist()) == list(range(7))
    assert len({len(rank) for rank in ranks}) == 1


def test_reference_logps_follow_their_pairs() -> None:
    reference = {"train": torch.arange(22.0).reshape(11, 2), "selection": torch.arange(14.0).reshape(7, 2) + 100}
    train, validation = served(module_of(3, reference_logps=reference))
    for split, batches in (("train", [b for window in train for b in window]), ("selection", validation)):
        for batch in batches:
            assert batch.reference_logps is not None
            assert batch.reference_logps.tolist() == reference[split][batch.index].T.flatten().tolist()


def test_invalid_arguments_raise() -> None:
    for name in ("batch_size", "micro_batch_size", "micro_batch_tokens", "eval_batch_size", "group_by_length"):
        with pytest.raises(DataError, match=rf"data\.{name}=0: must be at least 1"):
            module_of(1, **{name: 0})
    with pytest.raises(DataError, match="no pair to train on"):
        module_of(1, train=[])
    with pytest.raises(RuntimeError, match="serves a Trainer"):
        module_of(1).train_dataloader()


class Recorder(LightningModule):
    """A module that records its batches and takes one manual optimizer step per window."""

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
def test_trainer_loads_windows_and_resumes(tmp_path: Path) -> None:
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
    in_order = [i for batch in served(module_of(8))[1] for i in batch.index.tolist()]
    assert whole.validated == in_order * 4 and sorted(in_order) == list(range(7))
    first, trainer = fit(5)
    assert len(first.seen) == 5
    trainer.save_checkpoint(tmp_path / "at5.ckpt")
    rest, trainer = fit(8, tmp_path / "at5.ckpt")
    assert first.seen + rest.seen == whole.seen
    assert trainer.global_step == 8
