"""The constant that makes a stated optimum sum to one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BISECTIONS = 200
"""Halvings of the interval of a constant. More than float64 has digits, since the constant may be close to 0."""


def normalized(logps_at: Callable[[Tensor], Tensor], below: Tensor, above: Tensor) -> Tensor:
    """Return log-probabilities that depend on one constant for each prompt, where they sum to one.

    Args:
        logps_at: Function of ``(..., 1)`` constants to ``(..., R)`` log-probabilities, monotone in the constant.
        below: ``(..., 1)`` constants at which probabilities sum to at most 1.
        above: ``(..., 1)`` constants at which probabilities sum to at least 1.

    Returns:
        ``(..., R)`` normalized log-probabilities.
    """
    for _ in range(BISECTIONS):
        middle = (below + above) / 2
        is_above = logps_at(middle).logsumexp(-1, keepdim=True) > 0
        below, above = torch.where(is_above, below, middle), torch.where(is_above, middle, above)
    return logps_at((below + above) / 2).log_softmax(-1)


def normalized_per_token(logits: Tensor, lengths: Tensor) -> Tensor:
    """Return ``(..., R)`` log-probabilities ``logits + c lengths``, with the c of each row at which they sum to one."""
    total = logits.logsumexp(-1, keepdim=True)
    # Lengths are positive, so c = -total / length gives a sum of at least 1 for one extreme length and at most 1 for
    # the other: the solution lies between them.
    ends = torch.cat([-total / lengths.amin(-1, keepdim=True), -total / lengths.amax(-1, keepdim=True)], -1)
    return normalized(lambda c: logits + c * lengths, ends.amin(-1, keepdim=True), ends.amax(-1, keepdim=True))
