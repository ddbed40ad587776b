"""The pairs of each optimizer step and of its micro-batches, on any number of devices.

They are a pure function of the seed, the step and the lengths of the pairs, so a resumed run needs no other state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from spo.batching import even_batches, fewest_batches, steps_per_epoch

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Windows:
    """The schedule of windows, one window of pairs per optimizer step.

    An epoch is a permutation of all pairs, drawn from the seed and the epoch. Its last window may be smaller: it is
    never filled up, so no pair is seen twice in an epoch. It may even have fewer pairs than there are devices.

    With ``group_by_length``, the permutation is cut into groups of that many windows. Each group is sorted by length
    and cut into windows, and then the windows of the epoch are shuffled. Each pair still comes once in an epoch, and
    into each window with the same probability, whatever its length. The expected gradient of a window is therefore
    that of all pairs. Only the company of a pair changes: the pairs of a window have similar lengths. The smaller last
    window stays random, so that its pairs do not depend on length either.

    Attributes:
        lengths: ``(P,)`` length in tokens of each pair's longest sequence, to which a batch is padded.
        sizes: ``(P,)`` size of each pair in a micro-batch, see :func:`deal_micro_batches`.
        padded: Whether micro-batches are padded.
        batch_size: Number of pairs of a window over all devices.
        seed: Random seed of the order.
        world_size: Number of devices.
        group_by_length: Number of windows that are sorted together; ``None`` for no grouping.

    Raises:
        ValueError: If the pairs of a window are fewer than the devices.
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

    @property
    def per_epoch(self) -> int:
        """Return the number of windows in an epoch."""
        return steps_per_epoch(len(self.lengths), self.batch_size)

    def window(self, step: int) -> Indices:
        """Return the positions of one step's pairs over all devices."""
        epoch, position = divmod(step, self.per_epoch)
        return _order(self, epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def micro_batches(self, step: int, rank: int, max_pairs: int | None, max_tokens: int | None) -> list[Indices]:
        """Return the positions of one step's pairs on one device, by micro-batch (see :func:`deal_micro_batches`)."""
        window = self.window(step)
        sizes = self.lengths[window], self.sizes[window]
        batches = deal_micro_batches(*sizes, self.padded, rank, self.world_size, max_pairs, max_tokens)
        return [window[batch] for batch in batches]


# Two epochs: steps of the next one may be prefetched while the current one ends.
@lru_cache(maxsize=2)
def _order(windows: Windows, epoch: int) -> Indices:
    """Return the positions of all pairs of an epoch, window after window."""
    generator = np.random.default_rng((windows.seed, epoch))
    order = generator.permutation(len(windows.lengths))
    if windows.group_by_length is None:
        return order
    whole = len(order) // windows.batch_size * windows.batch_size
    group_size = windows.group_by_length * windows.batch_size
    groups = np.split(order[:whole], range(group_size, whole, group_size))
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
    """Deal pairs to devices, the longest first, and return one device's share in batches of similar lengths.

    Every device gets the same number of batches, since each forward pass of a sharded model needs all devices. It is
    the smallest number with which both limits hold on all devices, with one exception. Some devices may have one pair
    more than others and need a batch for each of their pairs. One of their batches then exceeds the limits by a pair.

    Args:
        lengths: ``(P,)`` length in tokens of each pair's longest sequence.
        sizes: ``(P,)`` number of each pair's sequences if batches are padded, otherwise number of its tokens.
        padded: Whether each row of a batch is padded to the longest sequence.
        rank: Rank of this device.
        world_size: Number of devices.
        max_pairs: Largest number of pairs in a batch; ``None`` for no limit.
        max_tokens: Largest number of tokens in a batch of several pairs; ``None`` for no limit.

    Returns:
        Positions of the pairs of each batch. With fewer pairs than devices, each device has one batch, which does not
        have a pair on the last devices.
    """
    # Dealing in order of length gives all devices about the same work.
    order = np.argsort(-lengths, kind="stable")
    widths = lengths if padded else np.ones_like(lengths)
    shares = [order[first::world_size] for first in range(world_size)]
    if len(lengths) < world_size:
        return [shares[rank]]
    items = [list(zip(widths[share].tolist(), sizes[share].tolist(), strict=True)) for share in shares]
    needed = max(fewest_batches(own, max_pairs, max_tokens) for own in items)
    # No device can have more batches than the smallest share has pairs.
    batches = even_batches(items[rank], min(needed, len(lengths) // world_size), max_pairs)
    return [shares[rank][batch] for batch in batches]
