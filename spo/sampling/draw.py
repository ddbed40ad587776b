"""The rule by which a token follows from logits and a number of the row's own: one for every sampler."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor


def uniform_numbers(seeds: Seq[int], length: int, device: torch.device) -> Tensor:
    """``(N, length)`` uniform in [0, 1), each row from its own seed: it does not depend on those beside it."""
    rows = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device, torch.float32 if device.type == "mps" else torch.float64)


def next_tokens(logits: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """One token per row, by inverting its distribution.

    Args:
        logits: ``(N, V)``.
        numbers: ``(N,)`` where to invert each row's cumulative distribution.
        temperature: of the softmax; 0 takes the likeliest token.

    Returns:
        ``(N,)`` token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # Each probability is known to the precision of the logits, but they are summed in float64, where the device has
    # it: the sums of a large vocabulary would round to its rare tokens' size. What they are divided by cancels.
    relative = (logits - logits.amax(-1, keepdim=True)) / temperature
    cumulative = relative.exp_().to(numbers.dtype).cumsum_(-1)
    tokens = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    return tokens.clamp(max=logits.shape[1] - 1).squeeze(1)
