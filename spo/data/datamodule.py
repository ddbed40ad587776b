"""The LightningDataModule: windows of pairs for training, every selection pair once for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from spo.data.collate import collate
from spo.data.rendering import TokenizedPair
from spo.data.rows import DataError
from spo.data.windows import Windows, cut
from spo.types import PreferenceBatch, Sequences, Window


class PreferenceDataModule(LightningDataModule):
    """Serves `Window`s to train on and `PreferenceBatch`es to validate on.

    The trainer must leave the samplers alone (``use_distributed_sampler=False``): the data is dealt to devices here.

    Args:
        train: pairs to learn from.
        selection: pairs to validate on.
        batch_size: pairs per optimiser step, over all devices.
        micro_batch_size: pairs per forward pass and device; ``None`` for all of the device's share.
        eval_batch_size: pairs per forward pass and device in validation.
        seed: of the order.
        num_workers: processes that collate.
        pad_token_id: what fills the right end of a batch.
        max_steps: optimiser steps of the whole run.
        reference_logps: precomputed reference log-probs of the splits ``train`` and ``selection``, each ``(P, n)``.

    Raises:
        DataError: when a size is not positive or a split is empty.
    """

    def __init__(
        self,
        train: Sequence[TokenizedPair],
        selection: Sequence[TokenizedPair],
        batch_size: int,
        micro_batch_size: int | None,
        eval_batch_size: int,
        seed: int,
        num_workers: int,
        pad_token_id: int,
        max_steps: int,
        reference_logps: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "eval_batch_size": eval_batch_size}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise DataError(f"data.{name}={size}: must be at least 1")
        if not train:
            raise DataError("there is no pair to train on")
        self.train, self.selection = train, selection
        self.batch_size, self.micro_batch_size, self.eval_batch_size = batch_size, micro_batch_size, eval_batch_size
        self.seed, self.num_workers, self.pad_token_id, self.max_steps = seed, num_workers, pad_token_id, max_steps
        self.reference_logps = reference_logps or {}

    def train_dataloader(self) -> DataLoader[Window]:
        """One `Window` per optimiser step; a resumed run is served the steps that are left."""
        trainer = self._trainer()
        dataset = _TrainWindows(
            self.train,
            Windows(len(self.train), self.batch_size, self.seed, trainer.world_size),
            trainer.global_rank,
            self.micro_batch_size,
            self.pad_token_id,
            self.reference_logps.get("train"),
            self._arrange(),
        )
        steps = _RemainingSteps(lambda: trainer.global_step, self.max_steps)
        return _ResumableLoader(dataset, batch_size=None, sampler=steps, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[PreferenceBatch] | list[Any]:
        """The selection pairs in order, each on exactly one device."""
        trainer = self._trainer()
        if not self.selection:
            return []
        if len(self.selection) < trainer.world_size:
            raise DataError(f"{len(self.selection)} selection pairs cannot be dealt to {trainer.world_size} devices")
        indices = np.arange(len(self.selection))
        batches = cut(indices, trainer.global_rank, trainer.world_size, self.eval_batch_size)
        dataset = _Batches(
            self.selection, batches, self.pad_token_id, self.reference_logps.get("selection"), self._arrange()
        )
        return DataLoader(dataset, batch_size=None, num_workers=self.num_workers)

    def _arrange(self) -> Callable[[Sequences], Sequences]:
        # Asked for when a fit has started: what the module settles on depends on its models.
        return self._trainer().lightning_module.speed.arrange

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("the data module serves a Trainer: call trainer.fit(module, datamodule=...)")
        return self.trainer


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
        pairs = [self.pairs[j] for j in indices]
        return collate(pairs, indices.tolist(), self.pad_token_id, self.reference_logps, self.arrange)


class _TrainWindows(Dataset[Window]):
    def __init__(
        self,
        pairs: Sequence[TokenizedPair],
        windows: Windows,
        rank: int,
        micro_batch_size: int | None,
        pad_token_id: int,
        reference_logps: Tensor | None,
        arrange: Callable[[Sequences], Sequences],
    ) -> None:
        self.batches = _Batches(pairs, [], pad_token_id, reference_logps, arrange)
        self.windows, self.rank, self.micro_batch_size = windows, rank, micro_batch_size

    def __getitem__(self, step: int) -> Window:
        micro_batches = self.windows.micro_batches(step, self.rank, self.micro_batch_size)
        return Window([self.batches.batch(indices) for indices in micro_batches], len(self.windows.window(step)))


class _RemainingSteps(Sampler[int]):
    """Steps from the trainer's current one to the last; as long as the whole run, which is how Lightning counts.

    The current step is asked for when iteration starts: a checkpoint may be restored after the loader is made.
    """

    def __init__(self, start: Callable[[], int], max_steps: int) -> None:
        self.start, self.max_steps = start, max_steps

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[int]:
        yield from range(self.start(), self.max_steps)


class _ResumableLoader(DataLoader[Window]):
    """Tells Lightning that resuming in the middle is safe. There is no state: the trainer's step is all of it."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
