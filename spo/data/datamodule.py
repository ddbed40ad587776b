"""The LightningDataModule: windows of pairs for training, every selection pair once for validation."""

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
    """Serves `Window`s to train on and `PreferenceBatch`es to validate on.

    The trainer must leave the samplers alone (``use_distributed_sampler=False``): the data is dealt to devices here.

    Args:
        train: pairs to learn from.
        selection: pairs to validate on.
        batch_size: pairs per optimiser step, over all devices.
        micro_batch_size: most pairs per forward pass and device; ``None`` for no limit.
        micro_batch_tokens: most tokens per forward pass and device, in validation too: of padded batches with their
            padding, of packed ones as :func:`pair_tokens` counts them; ``None`` for no limit. A pair that has more is a
            batch by itself.
        eval_batch_size: most pairs per forward pass and device in validation.
        group_by_length: windows whose pairs are sorted by length together (see :class:`Windows`); ``None`` for none.
        seed: of the order.
        num_workers: processes that collate.
        pad_token_id: what fills the right end of a batch.
        max_steps: optimiser steps of the whole run.
        reference_logps: precomputed reference log-probs of the splits ``train`` and ``selection``, each ``(P, n)``.

    Attributes:
        waited_s: seconds that training has waited for its windows so far.

    Raises:
        DataError: when a size is not positive or a split is empty.
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
        """One `Window` per optimiser step; a resumed run is served the steps that are left."""
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
        """The selection pairs, each on exactly one device."""
        trainer = self._trainer()
        if not self.selection:
            return []
        if len(self.selection) < trainer.world_size:
            raise DataError(f"{len(self.selection)} selection pairs cannot be dealt to {trainer.world_size} devices")
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
        """On the device, which is not waited for: Lightning by itself waits for all that is no bare tensor."""
        return batch.to_device_async(device)

    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": None,
            "num_workers": self.num_workers,
            "pin_memory": self._trainer().strategy.root_device.type == "cuda",
            # Seeds for the workers are drawn: from a generator of its own, or a resumed run would draw otherwise.
            "generator": torch.Generator(),
        }

    def _note_wait(self, seconds: float) -> None:
        self.waited_s += seconds

    def _sizes(self, pairs: Sequence[TokenizedPair]) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
        """Lengths and sizes of pairs, and whether they are padded: see :func:`~spo.data.windows.cut`."""
        speed = self._speed()
        padded = not speed.packs
        lengths = [len(pair.prompt_ids) + max(map(len, pair.completions)) for pair in pairs]
        sizes = [len(pair.completions) if padded else pair_tokens(pair, speed.share_prompts) for pair in pairs]
        return np.array(lengths), np.array(sizes), padded

    def _speed(self) -> Any:
        # Asked for when a fit has started: what the module settles on depends on its models.
        return self._trainer().lightning_module.speed

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("the data module serves a Trainer: call trainer.fit(module, datamodule=...)")
        return self.trainer


def pair_tokens(pair: TokenizedPair, share_prompts: bool) -> int:
    """Tokens that a model computes for a pair or list, without padding.

    Args:
        pair: with all of its completions.
        share_prompts: whether the prompt counts once, instead of once for each completion. Pairs that have a prompt in
            common count it each.
    """
    completions = pair.completions
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
        pairs = [self.pairs[j] for j in indices]
        return collate(pairs, indices.tolist(), self.pad_token_id, self.reference_logps, self.arrange)


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
        self.batches = _Batches(pairs, [], pad_token_id, reference_logps, arrange)
        self.windows, self.rank, self.limits = windows, rank, (micro_batch_size, micro_batch_tokens)

    def __getitem__(self, step: int) -> Window:
        micro_batches = self.windows.micro_batches(step, self.rank, *self.limits)
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


class _TrainLoader(DataLoader[Window]):
    """Tells how long each window was waited for.

    It tells Lightning, too, that resuming in the middle is safe. There is no state: the trainer's step is all of it.
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
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
