"""SPO's regularizer: the KL over the model's whole output distribution."""

from __future__ import annotations

from typing import ClassVar, Literal

from spo.regularizers.base import Regularizer, Weight


class GlobalKL(Regularizer):
    r"""KL(policy || reference) on samples of the policy, arXiv:2405.00747.

    .. math:: R = E_x E_{y\sim\pi(\cdot|x)} \sum_t KL(\pi(\cdot|x,y_{<t}) \,\|\, \pi_{ref}(\cdot|x,y_{<t}))

    By the chain rule its value is the sequence KL when y is drawn from the current policy at temperature 1. The
    gradient goes through the conditional distributions and treats y as given: low variance, biased by the missing
    dependence of the prefixes on the parameters. Samples are drawn every ``refresh_every`` optimiser steps and
    reused, which makes both value and gradient stale by up to that many steps. A sample cut at ``max_new_tokens``
    counts as a prefix, so R is then a lower bound.

    Args:
        weight: coefficient of R, or ``"beta"`` to follow the beta schedule.
        refresh_every: optimiser steps between two drawings of samples.
        num_samples: sequences in the buffer, one per training prompt drawn, over all ranks.
        batch_size: buffered sequences used in each optimiser step, over all ranks.
        max_new_tokens: length limit of a sample, in tokens.

    Raises:
        ValueError: a count is not positive, or ``batch_size`` exceeds ``num_samples``.
    """

    source: ClassVar[Literal["policy"]] = "policy"

    def __init__(
        self, weight: Weight, refresh_every: int, num_samples: int, batch_size: int, max_new_tokens: int
    ) -> None:
        super().__init__(weight)
        counts = {
            "refresh_every": refresh_every,
            "num_samples": num_samples,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"regularizer.{name} must be at least 1, got {value}")
        if batch_size > num_samples:
            raise ValueError(
                f"regularizer.batch_size ({batch_size}) exceeds regularizer.num_samples ({num_samples}): "
                "a step cannot use more buffered samples than there are"
            )
        self.refresh_every = refresh_every
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
