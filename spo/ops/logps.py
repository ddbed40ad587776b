"""Log-probabilities of completion tokens, from logits that exist or are computed a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from spo.types import Sequences

CACHE_ELEMENTS = 2**17
"""Elements of a chunk on a CPU: 0.5 MiB of float32 fit into a core's second-level cache, next to a second tensor."""


def at_least_float32(logits: Tensor) -> Tensor:
    """Convert half precision to float32: log-sums in bfloat16 are off by 0.1 nats. float32 and float64 stay as is."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


@dataclass(frozen=True)
class DeferredLogits:
    """``(M, V)`` logits that exist a few rows at a time, so that memory does not grow with ``M * V``.

    Attributes:
        states: ``(M, H)`` hidden states, the input of the language-model head.
        head: Function from ``(m, H)`` states to ``(m, V)`` logits.
        rows: Largest number of rows that exist at a time.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    rows: int

    def materialize(self) -> Tensor:
        """Compute all logits at once, which needs the memory that deferring them saves."""
        return self.head(self.states)

    def split(self, sizes: list[int]) -> list[DeferredLogits]:
        """Split into consecutive rows, as ``Tensor.split`` does."""
        return [replace(self, states=part) for part in self.states.split(sizes)]


Logits = Tensor | DeferredLogits
"""``(M, V)`` logits that exist or are computed on demand; :func:`by_rows` takes both."""


def concat_logits(parts: list[Logits]) -> Logits:
    """Concatenate logits along the rows. All have to be of one kind, and deferred ones of the same head."""
    deferred = [part for part in parts if isinstance(part, DeferredLogits)]
    if not deferred:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return replace(deferred[0], states=torch.cat([part.states for part in deferred]))


def rows_of(logits: Logits, index: Tensor) -> Logits:
    """Return the rows of logits at ``index``, a tensor of positions."""
    return replace(logits, states=logits.states[index]) if isinstance(logits, DeferredLogits) else logits[index]


def by_rows(function: Callable[..., Tensor], *arguments: Logits) -> Tensor:
    """Apply a row-wise function. Deferred logits are computed chunk by chunk, and again in the backward pass.

    Args:
        function: Function from tensors with the same leading size ``M`` to ``(M,)``.
        arguments: Logits ``(M, V)`` and tensors ``(M, ...)``.

    Returns:
        ``(M,)``.
    """
    deferred = [argument for argument in arguments if isinstance(argument, DeferredLogits)]
    if not deferred:
        return function(*arguments)
    stored = [argument.states if isinstance(argument, DeferredLogits) else argument for argument in arguments]

    def evaluated(*chunk: Tensor) -> Tensor:
        given = zip(arguments, chunk, strict=True)
        return function(*(a.head(part) if isinstance(a, DeferredLogits) else part for a, part in given))

    rows = min(argument.rows for argument in deferred)
    if len(stored[0]) <= rows:
        return evaluated(*stored)
    parts = zip(*(tensor.split(rows) for tensor in stored), strict=True)
    if torch.is_grad_enabled():
        return torch.cat(
            [checkpoint(evaluated, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )
    return torch.cat([evaluated(*part) for part in parts])


def in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the rows of ``(M, ...)`` tensors in chunks that stay in a CPU's cache through several passes.

    On an accelerator all rows are one chunk.
    """
    logits = tensors[0]
    rows = max(CACHE_ELEMENTS // logits.shape[-1], 1) if logits.device.type == "cpu" else max(len(logits), 1)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def completion_targets(sequences: Sequences) -> Tensor:
    """Return the ``(M,)`` ids of the completion tokens, in the order of ``completion_logits``."""
    return sequences.input_ids.flatten().index_select(0, sequences.completion_index)


def token_logps(logits: Logits, targets: Tensor) -> Tensor:
    """Compute the log-probability of each target, by log-softmax in at least float32.

    Args:
        logits: ``(M, V)`` next-token logits.
        targets: ``(M,)`` token ids.

    Returns:
        ``(M,)`` nats.
    """
    return by_rows(_TokenLogps.apply, logits, targets)


class _TokenLogps(torch.autograd.Function):
    """Log-softmax and gather in one; the only tensor of the size of the logits is their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        values, norms = [], []
        for rows, ids in in_cache(logits, targets):
            rows = at_least_float32(rows)
            # Shift by the maximum before summing: logit minus logsumexp would round at the size of the logits.
            top = rows.amax(-1, keepdim=True)
            norm = (rows - top).exp_().sum(-1, keepdim=True).log_()
            values.append((rows.gather(-1, ids[:, None]) - top - norm).squeeze(-1))
            norms += [top, norm]
        ctx.save_for_backward(logits, targets, torch.cat(norms[::2]), torch.cat(norms[1::2]))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, top, norm = ctx.saved_tensors
        logits_gradient = torch.empty_like(logits)
        for out, rows, *columns in in_cache(logits_gradient, logits, targets, top, norm, gradient):
            ids, row_top, row_norm, slope = (column.view(-1, 1) for column in columns)
            # d log p(t) / d logits = one_hot(t) - p
            probabilities = (at_least_float32(rows) - row_top).sub_(row_norm).exp_()
            out.copy_(probabilities.mul_(-slope).scatter_add_(-1, ids, slope))
        return logits_gradient, None


def sum_per_sequence(values: Tensor, sequences: Sequences) -> Tensor:
    """Sum per-token values within each sequence.

    Args:
        values: ``(M, ...)`` one or more values per completion token.
        sequences: ``N`` sequences that the tokens belong to.

    Returns:
        ``(N, ...)``.
    """
    # A padded sum instead of index_add, which adds in another order on each run of a CUDA device.
    padded = values.new_zeros(sequences.input_ids.numel(), *values.shape[1:])
    padded = padded.index_copy(0, sequences.completion_index, values)
    return padded.view(*sequences.input_ids.shape, *values.shape[1:]).sum(dim=1)
