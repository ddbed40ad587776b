"""The LightningDataModule: windows of pairs for training, each selection pair once for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from spo.data.collate import collate
from spo.data.rendering import TokenizedPair
from spo.data.rows import DataError
from spo.data.windows import Windows, deal_micro_batches
from spo.types import PreferenceBatch, Sequences, Window


class PreferenceDataModule(LightningDataModule):
    """A data module of :class:`~spo.types.Window` to train on and :class:`~spo.types.PreferenceBatch` to validate on.

    The data module deals the data to devices, so the trainer needs ``use_distributed_sampler=False``.

    Args:
        train: Pairs to train on.
        selection: Pairs to validate on.
        batch_size: Number of pairs per optimizer step over all devices.
        micro_batch_size: Largest number of pairs per forward pass and device; ``None`` for no limit.
        micro_batch_tokens: Largest number of tokens per forward pass and device, also in validation; ``None`` for no
            limit. Padding counts in padded batches, and :func:`pair_tokens` counts in packed ones. A pair with more
            tokens is a batch by itself.
        eval_batch_size: Largest number of pairs per forward pass and device in validation.
        group_by_length: Number of windows whose pairs are sorted by length together, see
            :class:`~spo.data.windows.Windows`; ``None`` for no grouping.
        seed: Random seed of the order.
        num_workers: Number of processes that collate.
        pad_token_id: Token that fills the right end of a row.
        max_steps: Number of optimizer steps of the whole run.
        reference_logps: Precomputed reference log-probs of the splits ``train`` and ``selection``, see
            :func:`~spo.data.collate.collate`.

    Attributes:
        waited_s: Time in seconds that training has waited for windows so far.

    Raises:
        DataError: If a size is not positive, or if there is no pair to train on.
    """

    def __init__(
        self,
        train: Sequence[TokenizedPair],
        selection: Sequence[TokenizedPair],
        batch_size: int,
        micro_batch_size: int | None,
        micro_batch_tokens: int | None,
        eval_batch_size: int,
        group_by_length: int | None,
        seed: int,
        num_workers: int,
        pad_token_id: int,
        max_steps: int,
        reference_logps: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "batch_size": batch_size,
            "micro_batch_size": micro_batch_size,
            "micro_batch_tokens": micro_batch_tokens,
            "eval_batch_size": eval_batch_size,
            "group_by_length": group_by_length,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise DataError(f"data.{name}={size}: must be at least 1")
        if not train:
            raise DataError("there is no pair to train on")
        self.train, self.selection = train, selection
        self.batch_size, self.eval_batch_size, self.group_by_length = batch_size, eval_batch_size, group_by_length
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.seed, self.num_workers, self.pad_token_id, self.max_steps = seed, num_workers, pad_token_id, max_steps
        self.reference_logps = reference_logps or {}
        self.waited_s = 0.0

    def train_dataloader(self) -> DataLoader[Window]:
        """Return a loader of one window per optimizer step; a resumed run gets the remaining steps."""
        trainer = self._trainer()
        dataset = _TrainWindows(
            self.train,
            Windows(*self._sizes(self.train), self.batch_size, self.seed, trainer.world_size, self.group_by_length),
            trainer.global_rank,
            self.micro_batch_size,
            self.micro_batch_tokens,
            self.pad_token_id,
            self.reference_logps.get("train"),
            self._speed().arrange,
        )
        steps = _RemainingSteps(lambda: trainer.global_step, self.max_steps)
        return _TrainLoader(self._note_wait, dataset, sampler=steps, **self._loading())

    def val_dataloader(self) -> DataLoader[PreferenceBatch] | list[Any]:
        """Return a loader of the selection pairs, each on exactly one device."""
        trainer = self._trainer()
        if not self.selection:
            return []
        batches = deal_micro_batches(
            *self._sizes(self.selection),
            trainer.global_rank,
            trainer.world_size,
            self.eval_batch_size,
            self.micro_batch_tokens,
        )
        dataset = _Batches(
            self.selection, batches, self.pad_token_id, self.reference_logps.get("selection"), self._speed().arrange
        )
        return DataLoader(dataset, persistent_workers=self.num_workers > 0, **self._loading())

    def transfer_batch_to_device(
        self, batch: Window | PreferenceBatch, device: torch.device, dataloader_idx: int
    ) -> Window | PreferenceBatch:
        """Copy a batch to the device without blocking the host; Lightning blocks for all batches but bare tensors."""
        return batch.to_device_async(device)

    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": None,  # The data sets return whole batches.
            "num_workers": self.num_workers,
            "pin_memory": self._trainer().strategy.root_device.type == "cuda",
            # The loader draws seeds for its workers. From the global generator, they would shift a resumed run's draws.
            "generator": torch.Generator(),
        }

    def _note_wait(self, seconds: float) -> None:
        self.waited_s += seconds

    def _sizes(self, pairs: Sequence[TokenizedPair]) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
        """Return lengths, sizes and padding as :func:`~spo.data.windows.deal_micro_batches` takes them."""
        speed = self._speed()
        padded = not speed.packs
        lengths = [len(pair.prompt_ids) + max(map(len, pair.sequences)) for pair in pairs]
        sizes = [len(pair.sequences) if padded else pair_tokens(pair, speed.share_prompts) for pair in pairs]
        return np.array(lengths), np.array(sizes), padded

    def _speed(self) -> Any:
        # Read after a fit has started, since the settings that the module resolves depend on its models.
        return self._trainer().lightning_module.speed

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("the data module serves a Trainer: call trainer.fit(module, datamodule=...)")
        return self.trainer


def pair_tokens(pair: TokenizedPair, share_prompts: bool) -> int:
    """Return the number of tokens that a model computes for a pair or list, without padding.

    Args:
        pair: Pair or list with all of its completions, further ones included.
        share_prompts: Whether the prompt counts once instead of once for each completion. Two pairs with the same
            prompt count it twice.
    """
    completions = pair.sequences
    return len(pair.prompt_ids) * (1 if share_prompts else len(completions)) + sum(map(len, completions))


class _Batches(Dataset[PreferenceBatch]):
    def __init__(
        self,
        pairs: Sequence[TokenizedPair],
        batches: Sequence[NDArray[np.int64]],
        pad_token_id: int,
        reference_logps: Tensor | None,
        arrange: Callable[[Sequences], Sequences],
    ) -> None:
        self.pairs, self.batches = pairs, batches
        self.pad_token_id, self.reference_logps = pad_token_id, reference_logps
        self.arrange = arrange

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> PreferenceBatch:
        return self.batch(self.batches[i])

    def batch(self, indices: NDArray[np.int64]) -> PreferenceBatch:
        # A device without a pair computes the sequences of some pair, because the devices wait for each other.
        chosen = indices.tolist() or [0]
        pairs = [self.pairs[j] for j in chosen]
        batch = collate(pairs, chosen, self.pad_token_id, self.reference_logps, self.arrange)
        return batch if len(indices) else batch.without_pairs()


class _TrainWindows(Dataset[Window]):
    def __init__(
        self,
        pairs: Sequence[TokenizedPair],
        windows: Windows,
        rank: int,
        micro_batch_size: int | None,
        micro_batch_tokens: int | None,
        pad_token_id: int,
        reference_logps: Tensor | None,
        arrange: Callable[[Sequences], Sequences],
    ) -> None:
        # Without batches of its own: the windows of a step decide which ones are collated.
        self.batches = _Batches(pairs, [], pad_token_id, reference_logps, arrange)
        self.windows, self.rank, self.limits = windows, rank, (micro_batch_size, micro_batch_tokens)

    def __getitem__(self, step: int) -> Window:
        micro_batches = self.windows.micro_batches(step, self.rank, *self.limits)
        return Window([self.batches.batch(indices) for indices in micro_batches], len(self.windows.window(step)))


class _RemainingSteps(Sampler[int]):
    """Steps from the trainer's current one to the last.

    Its length is that of the whole run, since Lightning counts the steps before a resume too. The current step is read
    when iteration starts, because a checkpoint may be restored after the loader is made.
    """

    def __init__(self, start: Callable[[], int], max_steps: int) -> None:
        self.start, self.max_steps = start, max_steps

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[int]:
        yield from range(self.start(), self.max_steps)


class _TrainLoader(DataLoader[Window]):
    """A loader that measures how long training waits for each window.

    Its empty state tells Lightning that resuming within an epoch is safe: the trainer's step is the whole state.
    """

    def __init__(self, note_wait: Callable[[float], None], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.note_wait = note_wait

    def __iter__(self) -> Iterator[Window]:  # type: ignore[override]
        windows = super().__iter__()
        while True:
            started = perf_counter()
            window = next(windows, None)
            self.note_wait(perf_counter() - started)
            if window is None:
                return
            yield window

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the empty state."""
