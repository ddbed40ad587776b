"""Log-probabilities of completion tokens, from logits that exist or are made a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from spo.types import Sequences

ELEMENTS_IN_CACHE = 2**17
"""Half a MiB of float32: what a core's second-level cache holds, with room for a second tensor."""


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision is widened, float32 and float64 are kept: log-sums in bfloat16 are off by 0.1 nats."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


@dataclass(frozen=True)
class DeferredLogits:
    """``(M, V)`` logits that exist a few rows at a time, so that memory does not grow with ``M * V``.

    Attributes:
        states: ``(M, H)`` hidden states, as the language-model head is given them.
        head: from ``(m, H)`` states to ``(m, V)`` logits.
        rows: how many exist at one time.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]
    rows: int

    def materialize(self) -> Tensor:
        """All of them, which is what they are there to avoid."""
        return self.head(self.states)

    def split(self, sizes: list[int]) -> list[DeferredLogits]:
        """Consecutive rows, as a tensor is split."""
        return [replace(self, states=part) for part in self.states.split(sizes)]


Logits = Tensor | DeferredLogits
"""``(M, V)``, there already or made on demand: :func:`by_rows` takes both."""


def concat_logits(parts: list[Logits]) -> Logits:
    """Logits one after the other; all of one kind, and deferred ones of the same head."""
    deferred = [part for part in parts if isinstance(part, DeferredLogits)]
    if not deferred:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return replace(deferred[0], states=torch.cat([part.states for part in deferred]))


def by_rows(function: Callable[..., Tensor], *arguments: Logits) -> Tensor:
    """Applies a row-wise function; where logits are deferred chunk by chunk, each recomputed in backward.

    Args:
        function: maps tensors with the same leading size ``M`` to ``(M,)``.
        arguments: logits ``(M, V)`` and tensors ``(M, ...)``.

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
    """Rows of ``(M, ...)`` tensors, a few at a time: on a CPU few enough to stay in its cache through several passes.

    An accelerator is given all of them at once.
    """
    logits = tensors[0]
    rows = max(ELEMENTS_IN_CACHE // logits.shape[-1], 1) if logits.device.type == "cpu" else max(len(logits), 1)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def completion_targets(sequences: Sequences) -> Tensor:
    """``(M,)`` the completion tokens themselves, in the order of :func:`completion_logits`."""
    return sequences.input_ids.flatten().index_select(0, sequences.completion_index)


def token_logps(logits: Logits, targets: Tensor) -> Tensor:
    """Log-probability of each target, by log-softmax in at least float32.

    Args:
        logits: ``(M, V)``.
        targets: ``(M,)`` token ids.

    Returns:
        ``(M,)`` nats.
    """
    return by_rows(_TokenLogps.apply, logits, targets)


class _TokenLogps(torch.autograd.Function):
    """Log-softmax and gather in one: nothing as large as the logits is written but their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        values, norms = [], []
        for rows, wanted in in_cache(logits, targets):
            rows = at_least_float32(rows)
            # shifted before it is summed: logit minus logsumexp would round at the size of the logits
            top = rows.amax(-1, keepdim=True)
            norm = (rows - top).exp_().sum(-1, keepdim=True).log_()
            values.append((rows.gather(-1, wanted[:, None]) - top - norm).squeeze(-1))
            norms += [top, norm]
        ctx.save_for_backward(logits, targets, torch.cat(norms[::2]), torch.cat(norms[1::2]))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, top, norm = ctx.saved_tensors
        found = torch.empty_like(logits)
        for out, rows, *row in in_cache(found, logits, targets, top, norm, gradient):
            wanted, highest, total, slope = (value.view(-1, 1) for value in row)
            # d log p(t) / d logits is one_hot(t) - p
            probabilities = (at_least_float32(rows) - highest).sub_(total).exp_()
            out.copy_(probabilities.mul_(-slope).scatter_add_(-1, wanted, slope))
        return found, None


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
    padded = padded.index_copy(0, sequences.completion_index, values)
    return padded.view_as(sequences.input_ids).sum(dim=1)
