"""Learning rate, warm-up and length of a training: numbers that follow from the size of the model and of the data."""

from __future__ import annotations

import math
from decimal import Decimal

from spo.batching import steps_per_epoch

RATES = ((1e6, 1e-3), (1e7, 1e-4), (135e6, 2e-5), (1e9, 5e-6), (7e9, 7e-7))
"""Numbers of parameters, ascending, and the learning rate of full fine-tuning for each."""
LORA_FACTOR = 10
"""Ratio of the learning rate of a low-rank adapter to that of full fine-tuning."""


def learning_rate(num_parameters: int, lora: bool = False) -> float:
    """Return a learning rate for preference training by the size of the model, rounded to three digits.

    Between two sizes of :data:`RATES` it is interpolated on logarithmic scales; beyond the ends it is constant.

    Args:
        num_parameters: Number of parameters of the base model.
        lora: Whether a low-rank adapter is trained instead of the whole model.
    """
    sizes, rates = ([math.log(value) for value in column] for column in zip(*RATES, strict=True))
    size = min(max(math.log(num_parameters), sizes[0]), sizes[-1])
    above = next(i for i in range(1, len(sizes)) if size <= sizes[i])
    share = (size - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
    rate = math.exp(rates[above - 1] + share * (rates[above] - rates[above - 1]))
    return float(f"{rate * (LORA_FACTOR if lora else 1):.3g}")


def warmup_steps(warmup: float, steps: int) -> int:
    """Return the number of optimizer steps over which the learning rate rises from 0.

    Args:
        warmup: Number of steps, or a share of them below 1. A share is rounded down, so a short run is not spent on it.
        steps: Number of optimizer steps of the run.
    """
    return int(Decimal(str(warmup)) * steps) if warmup < 1 else int(warmup)


def training_steps(max_steps: int | None, max_epochs: float | None, num_pairs: int, batch_size: int) -> int:
    """Return the number of optimizer steps of a run: that of the limit that ends first.

    Args:
        max_steps: Largest number of steps, or ``None`` for no such limit.
        max_epochs: Largest number of passes over the pairs, not necessarily a whole one, or ``None``.
        num_pairs: Number of pairs to train on.
        batch_size: Number of pairs per step, over all devices.

    Raises:
        ValueError: Neither limit is given.
    """
    limits = [] if max_steps is None else [max_steps]
    if max_epochs is not None:
        limits.append(math.ceil(Decimal(str(max_epochs)) * steps_per_epoch(num_pairs, batch_size)))
    if not limits:
        raise ValueError("trainer.max_steps and trainer.max_epochs are both null: set one of them")
    return min(limits)
