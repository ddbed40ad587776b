"""Choice of a token by logits and a random number of its row, the same for every sampler."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor


def uniform_numbers(seeds: Seq[int], length: int, device: torch.device) -> Tensor:
    """Draw uniform numbers in [0, 1), each row from its own seed, so that no row depends on the others.

    Args:
        seeds: Seed of each of the ``N`` rows.
        length: Numbers per row.
        device: Device of the result.

    Returns:
        ``(N, length)`` float64, or float32 on MPS, which does not support float64.
    """
    rows = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    dtype = widest_dtype(device)
    # Rounded to float32, the largest numbers would be 1, which stands for the last token even if it is impossible.
    return torch.stack(rows).to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2).to(device)


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which does not support float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_top_p(top_p: float) -> None:
    """Refuse a ``top_p`` that is not above 0 and at most 1.

    Raises:
        ValueError: ``top_p`` is out of range.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p has to be above 0 and at most 1, not {top_p:g}")


def relative_weights(logits: Tensor, temperature: float) -> Tensor:
    """Return the ``(N, V)`` probabilities of tokens, relative to the likeliest token of each row.

    Args:
        logits: ``(N, V)`` next-token logits.
        temperature: Temperature of the softmax, above 0.
    """
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).exp_()


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Return the smallest set of likeliest tokens whose probability reaches ``top_p`` (Holtzman et al., 2020).

    Of equally likely tokens at the edge of the set, those of lower ids are in it.

    Args:
        weights: ``(N, V)`` probabilities up to a factor of each row.
        top_p: Probability to reach, above 0 and at most 1.

    Returns:
        ``(N, V)``, true for tokens of the set, which always has the likeliest token of a row.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.cumsum(-1)
    kept = cumulative.roll(1, dims=-1) < top_p * cumulative[:, -1:]
    kept[:, 0] = True
    return torch.empty_like(kept).scatter_(1, order, kept)


def next_tokens(logits: Tensor, numbers: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """Choose one token per row, by inverting its cumulative distribution.

    Args:
        logits: ``(N, V)`` next-token logits.
        numbers: ``(N,)`` values in [0, 1) at which the cumulative distributions are inverted.
        temperature: Temperature of the softmax; 0 takes the likeliest token.
        top_p: Probability that the nucleus has to reach, see :func:`nucleus`; 1 draws from all tokens.

    Returns:
        ``(N,)`` token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # The probabilities are summed in the dtype of the numbers, float64 where the device has it: in float32, the sums
    # over a large vocabulary would round rare tokens away. The normalizer cancels, so there is no division.
    weights = relative_weights(logits, temperature).to(numbers.dtype)
    if top_p < 1:
        weights = weights.masked_fill(~nucleus(weights, top_p), 0)
    cumulative = weights.cumsum_(-1)
    tokens = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
    return tokens.clamp(max=logits.shape[1] - 1).squeeze(1)
