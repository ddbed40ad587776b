"""Log-probabilities of completion tokens under a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spo.types import Sequences

ROWS_PER_CHUNK = 2048
"""Completion tokens whose float32 vocabulary row exists at one time; bounds memory, never changes a value."""


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision is widened, float32 and float64 are kept: log-sums in bfloat16 are off by 0.1 nats."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def by_rows(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Applies a row-wise function chunk by chunk, recomputing each chunk in backward instead of storing it.

    Args:
        function: maps tensors with the same leading size ``M`` to ``(M,)``.
        tensors: each ``(M, ...)``.

    Returns:
        ``(M,)``.
    """
    if tensors[0].shape[0] <= ROWS_PER_CHUNK:
        return function(*tensors)
    parts = zip(*(tensor.split(ROWS_PER_CHUNK) for tensor in tensors), strict=True)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
    return torch.cat([function(*part) for part in parts])


@contextmanager
def _head_sees_only(model: nn.Module, rows: Tensor) -> Iterator[None]:
    """Lets the language-model head run on the given flattened positions alone.

    The model's own forward stays in charge, so soft-capping, scaling and biases apply as the architecture defines
    them; only the rows that its head is given change, from ``(N, T, H)`` to ``(1, M, H)``.
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args
        return (hidden.flatten(0, 1).index_select(0, rows).unsqueeze(0), *rest)

    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def completion_logits(model: nn.Module, sequences: Sequences) -> Tensor:
    """Next-token logits that predict the completion tokens; prompt and padding positions never reach the head.

    Args:
        model: a Hugging Face causal language model.
        sequences: ``N`` sequences with ``M`` completion tokens in all.

    Returns:
        ``(M, V)`` logits in the model's dtype, sequence after sequence.
    """
    with _head_sees_only(model, sequences.completion_index - 1):  # type: ignore[operator]
        output = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask.long(), use_cache=False)
    return output.logits.squeeze(0)


def completion_targets(sequences: Sequences) -> Tensor:
    """``(M,)`` the completion tokens themselves, in the order of :func:`completion_logits`."""
    return sequences.input_ids.flatten().index_select(0, sequences.completion_index)  # type: ignore[arg-type]


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, by log-softmax in at least float32.

    Args:
        logits: ``(M, V)``.
        targets: ``(M,)`` token ids.

    Returns:
        ``(M,)`` nats.
    """

    def rows(logits: Tensor, targets: Tensor) -> Tensor:
        # not logit minus logsumexp: that rounds at the size of the logits, not of their differences
        return at_least_float32(logits).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    return by_rows(rows, logits, targets)


def sum_per_sequence(values: Tensor, sequences: Sequences) -> Tensor:
    """Adds up per-token values within each sequence.

    Args:
        values: ``(M,)`` one per completion token.
        sequences: the ``N`` sequences the tokens belong to.

    Returns:
        ``(N,)``.
    """
    # A padded sum instead of index_add: the order of additions, hence the last bit, is fixed on every device.
    padded = values.new_zeros(sequences.input_ids.numel())
    padded = padded.index_copy(0, sequences.completion_index, values)  # type: ignore[arg-type]
    return padded.view_as(sequences.input_ids).sum(dim=1)


def completion_logps(model: nn.Module, sequences: Sequences) -> Tensor:
    """``(N,)`` log pi(completion | prompt) in nats, summed over completion tokens (end-of-text included)."""
    logits = completion_logits(model, sequences)
    return sum_per_sequence(token_logps(logits, completion_targets(sequences)), sequences)
