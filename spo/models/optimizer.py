"""AdamW that leaves norms and biases out of weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
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
        {"params": [p for _, p in named if id(p) not in ids], "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    first, second = betas
    return torch.optim.AdamW(filled, lr=lr, betas=(first, second), eps=eps, weight_decay=weight_decay, fused=fused)


def is_norm_or_bias(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter is the weight of a norm, or a bias."""
    return parameter.ndim < 2 or name.endswith("bias")


def make_with_names(
    make: Callable[[list[Named]], Optimizer], model: nn.Module, params: Iterable[nn.Parameter]
) -> Optimizer:
    """Make an optimizer from parameters with their names.

    Args:
        make: Function from named parameters to an optimizer.
        model: Model that the parameters belong to, as it is now: sharding replaces them.
        params: Parameters to train.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return make([(names[id(parameter)], parameter) for parameter in params])
