"""Fingerprint of weights: a number that changes when any bit of them does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

WORD_BYTES, HALF_WORD_BITS = 8, 32
MAX_WORDS = 2**24
"""Most words of a temporary copy, of 128 MiB."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, WORD_BYTES: torch.int64}
"""Integer type by its size in bytes."""


def fingerprint(tensors: Iterable[Tensor]) -> int | None:
    """Return a number that depends on every bit of the tensors and on the place of each row and column.

    It is a sum of integers, so it is the same on every device. It reads each tensor twice and waits for the device
    once. PyTorch's version counters would cost nothing, but an update through ``Tensor.data`` does not change them.

    Args:
        tensors: Weights.

    Returns:
        The fingerprint, or ``None`` for no tensors.
    """
    sums = [part for tensor in tensors for part in _sums(tensor.detach())]
    if not sums:
        return None
    whole = torch.cat([part.to(sums[0].device) for part in sums])
    # Integers overflow without an error, so this is a sum modulo 2^64. Odd factors keep every bit of a term.
    factors = torch.arange(1, 2 * len(whole), 2, device=whole.device)
    return int((whole * factors).sum())


def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the sums of the rows and of the columns of a tensor's bits, read as integers."""
    rows = torch.atleast_2d(tensor.contiguous()).flatten(0, -2)
    if rows.shape[-1] * rows.element_size() % WORD_BYTES > 0:
        bits = rows.view(INTEGERS[rows.element_size()])
        yield from (bits.sum(1), bits.sum(0))
        return
    words = rows.view(torch.int64)  # Sums of narrow integers are many times slower on a CPU.
    for part in words.split(max(MAX_WORDS // max(words.shape[1], 1), 1)):
        yield part.sum(1)
        # The highest bits of an even number of words may cancel in a sum modulo 2^64; in their upper halves they count.
        yield (part >> HALF_WORD_BITS).sum(0)
