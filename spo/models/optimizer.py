"""Optimizers: AdamW that leaves norms and biases out of weight decay, groups of parameters, and gradient norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from spo.bounds import NonNegativeFloat, PositiveFloat

Named = tuple[str, nn.Parameter]


def adamw(
    params: Iterable[nn.Parameter | Named],
    /,
    lr: PositiveFloat,
    betas: Sequence[float],
    eps: NonNegativeFloat,
    weight_decay: NonNegativeFloat,
    decay_norm_and_bias: bool,
    fused: bool | None,
) -> Optimizer:
    """Make torch's AdamW.

    Parameters with fewer than two dimensions are norms, biases and single numbers. Biases of several experts are
    stacked to a matrix, which the name shows. Embeddings are decayed, as in the Trainer of transformers. Without
    weight decay there is one group of parameters, so that checkpoints of version 0.1.0 fit.

    Args:
        params: Parameters to train, with or without their names.
        lr: Learning rate.
        betas: Decay rates of the two running means.
        eps: Number added to the denominator.
        weight_decay: Weight decay, decoupled from the gradient.
        decay_norm_and_bias: Whether norms and biases are decayed too.
        fused: Whether one kernel updates all weights.
    """
    named = [param if isinstance(param, tuple) else ("", param) for param in params]
    spared = [] if decay_norm_and_bias or not weight_decay else [p for name, p in named if is_norm_or_bias(name, p)]
    ids = set(map(id, spared))
    groups = [
        {"params": some, "weight_decay": decay}
        for of_decay, decay in (([p for _, p in named if id(p) not in ids], weight_decay), (spared, 0.0))
        for some in apart(of_decay)
    ]
    first, second = betas
    return torch.optim.AdamW(groups, lr=lr, betas=(first, second), eps=eps, weight_decay=weight_decay, fused=fused)


def apart(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return sharded and whole parameters in lists of their own, since one kernel does not update both."""
    kinds = [[p for p in params if isinstance(p, DTensor) == is_sharded] for is_sharded in (True, False)]
    return [some for some in kinds if some]


def is_norm_or_bias(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is the weight of a norm, or a bias."""
    return parameter.ndim < 2 or name.endswith("bias")


def make_with_names(
    make: Callable[[list[Named]], Optimizer], models: Mapping[str, nn.Module], params: Iterable[nn.Parameter]
) -> Optimizer:
    """Make an optimizer from parameters with their names.

    Args:
        make: Function from named parameters to an optimizer.
        models: Models that the parameters belong to, as they are now (sharding replaces parameters), by the beginning
            of the names of their parameters.
        params: Parameters to train.
    """
    names = {id(p): prefix + name for prefix, model in models.items() for name, p in model.named_parameters()}
    return make([(names[id(parameter)], parameter) for parameter in params])


def make_apart(make: Callable[[list[Any]], Optimizer], params: Iterable[nn.Parameter]) -> Optimizer:
    """Make an optimizer in which sharded and whole parameters are groups of their own, if there are both.

    Args:
        make: Function from parameters, or groups of them, to an optimizer.
        params: Parameters to train.
    """
    groups = apart(list(params))
    return make(groups[0] if len(groups) == 1 else [{"params": group} for group in groups])


def clip_gradients(params: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Limit the norm of all gradients together, and return it as it was before.

    Args:
        params: Parameters, sharded or whole.
        limit: Largest norm, or ``None`` for no limit.
    """
    groups = apart(params)
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))
    for group in groups:
        clip_grads_with_norm_(group, float("inf") if limit is None else limit, total)
    return total
