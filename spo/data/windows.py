"""Which pairs each optimiser step sees: a pure function of the seed and the step, on any number of devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Windows:
    """The schedule of windows, one window of pairs per optimiser step.

    An epoch is a permutation of all pairs, drawn from seed and epoch. Its last window may be smaller; it is never
    filled up, so no pair is seen twice in an epoch. Only where that window has fewer pairs than there are devices is it
    left out, because a device without a pair could not take part in the step.

    Attributes:
        num_pairs: pairs of the split.
        batch_size: pairs of a window over all devices.
        seed: of the order.
        world_size: devices.
    """

    num_pairs: int
    batch_size: int
    seed: int
    world_size: int

    def __post_init__(self) -> None:
        if self.batch_size < self.world_size:
            raise ValueError(f"data.batch_size={self.batch_size} pairs cannot be dealt to {self.world_size} devices")
        if self.num_pairs < self.world_size:
            raise ValueError(f"{self.num_pairs} pairs cannot be dealt to {self.world_size} devices")

    @property
    def per_epoch(self) -> int:
        """Windows of an epoch."""
        full, rest = divmod(self.num_pairs, self.batch_size)
        return full + (rest >= self.world_size)

    def window(self, step: int) -> NDArray[np.int64]:
        """The pairs of one step, over all devices."""
        epoch, position = divmod(step, self.per_epoch)
        order = _permutation(self.num_pairs, self.seed, epoch)
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def micro_batches(self, step: int, rank: int, micro_batch_size: int | None) -> list[NDArray[np.int64]]:
        """The pairs of one step on one device, in micro-batches (see `cut`)."""
        return cut(self.window(step), rank, self.world_size, micro_batch_size)


def cut(indices: NDArray[np.int64], rank: int, world_size: int, size: int | None) -> list[NDArray[np.int64]]:
    """Deals ``indices`` to devices one by one, and returns this device's share in batches of about ``size``.

    Every device gets the same number of batches, since each forward pass of a sharded model needs all devices. So the
    batches of a device are of even sizes, and one may hold a single pair more than ``size`` where the shares differ.

    Args:
        indices: at least ``world_size`` of them.
        rank: this device.
        world_size: devices.
        size: pairs of a batch; ``None`` for all at once.
    """
    smallest, largest = len(indices) // world_size, -(-len(indices) // world_size)
    batches = 1 if size is None else min(-(-largest // size), smallest)
    return np.array_split(indices[rank::world_size], batches)


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(n)
