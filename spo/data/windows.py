"""Which pairs each optimiser step sees, and in which micro-batches: a pure function of the seed, the step and the
lengths of the pairs, on any number of devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from spo.batching import even_batches, fewest_batches

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Windows:
    """The schedule of windows, one window of pairs per optimiser step.

    An epoch is a permutation of all pairs, drawn from seed and epoch. Its last window may be smaller; it is never
    filled up, so no pair is seen twice in an epoch. Only where that window has fewer pairs than there are devices is it
    left out, because a device without a pair could not take part in the step.

    Grouped by length, each ``group_by_length`` windows' worth of the permutation is sorted by length and cut into
    windows, and the windows of the epoch are shuffled. As before, each pair comes once in an epoch, and into each
    window with the same probability, whatever its length: a window's gradient is that of all pairs in expectation.
    What changes is which pairs meet: those of a window are about equally long. The smaller last window is left as
    drawn, so that who is in it does not depend on length either.

    Attributes:
        lengths: ``(P,)`` tokens of the longest sequence of each pair of the split, to which a batch is padded.
        sizes: ``(P,)`` what a pair adds to a micro-batch, see :func:`deal_micro_batches`.
        padded: whether micro-batches are.
        batch_size: pairs of a window over all devices.
        seed: of the order.
        world_size: devices.
        group_by_length: windows that are sorted together; ``None`` for no grouping.
    """

    lengths: Indices
    sizes: Indices
    padded: bool
    batch_size: int
    seed: int
    world_size: int
    group_by_length: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < self.world_size:
            raise ValueError(f"data.batch_size={self.batch_size} pairs cannot be dealt to {self.world_size} devices")
        if len(self.lengths) < self.world_size:
            raise ValueError(f"{len(self.lengths)} pairs cannot be dealt to {self.world_size} devices")

    @property
    def per_epoch(self) -> int:
        """Windows of an epoch."""
        full, rest = divmod(len(self.lengths), self.batch_size)
        return full + (rest >= self.world_size)

    def window(self, step: int) -> Indices:
        """The pairs of one step, over all devices."""
        epoch, position = divmod(step, self.per_epoch)
        return _order(self, epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def micro_batches(self, step: int, rank: int, max_pairs: int | None, max_tokens: int | None) -> list[Indices]:
        """The pairs of one step on one device, in micro-batches (see :func:`deal_micro_batches`)."""
        window = self.window(step)
        sizes = self.lengths[window], self.sizes[window]
        batches = deal_micro_batches(*sizes, self.padded, rank, self.world_size, max_pairs, max_tokens)
        return [window[batch] for batch in batches]


@lru_cache(maxsize=2)
def _order(windows: Windows, epoch: int) -> Indices:
    """The pairs of an epoch, window after window."""
    generator = np.random.default_rng((windows.seed, epoch))
    order = generator.permutation(len(windows.lengths))
    if windows.group_by_length is None:
        return order
    whole = len(order) // windows.batch_size * windows.batch_size
    together = windows.group_by_length * windows.batch_size
    groups = np.split(order[:whole], range(together, whole, together))
    by_length = [group[np.argsort(windows.lengths[group], kind="stable")] for group in groups]
    full = np.concatenate(by_length).reshape(-1, windows.batch_size)
    return np.concatenate([generator.permutation(full).ravel(), order[whole:]])


def deal_micro_batches(
    lengths: Indices,
    sizes: Indices,
    padded: bool,
    rank: int,
    world_size: int,
    max_pairs: int | None,
    max_tokens: int | None,
) -> list[Indices]:
    """Deals pairs to devices, the longest first, and returns this device's share in batches of similar lengths.

    Every device gets the same number of batches, since each forward pass of a sharded model needs all devices; it is
    the smallest with which both limits hold on all of them. Where some devices have a pair more than the others and
    need a batch for each, they make do with one batch less, which has a pair too many.

    Args:
        lengths: ``(P,)`` tokens of the longest sequence of each of at least ``world_size`` pairs.
        sizes: ``(P,)`` sequences of each pair where batches are padded, else tokens of all of them.
        padded: whether a batch has its longest sequence's tokens for each of its sequences.
        rank: this device.
        world_size: devices.
        max_pairs: of a batch; ``None`` for no limit.
        max_tokens: of a batch, but for a pair that has more by itself; ``None`` for no limit.

    Returns:
        Positions of pairs.
    """
    order = np.argsort(-lengths, kind="stable")
    widths = lengths if padded else np.ones_like(lengths)
    shares = [order[first::world_size] for first in range(world_size)]
    items = [list(zip(widths[share].tolist(), sizes[share].tolist(), strict=True)) for share in shares]
    needed = max(fewest_batches(own, max_pairs, max_tokens) for own in items)
    batches = even_batches(items[rank], min(needed, len(lengths) // world_size), max_pairs)
    return [shares[rank][batch] for batch in batches]
