"""SPO's regularizer: the KL over the model's whole output distribution."""

from __future__ import annotations

from typing import ClassVar, Literal

from spo.bounds import PositiveInt
from spo.ops import KL_ESTIMATORS, KLEstimator
from spo.regularizers.base import Regularizer, Weight


class GlobalKL(Regularizer):
    r"""KL(policy || reference) on samples of the policy, arXiv:2405.00747.

    .. math:: R = E_x E_{y\sim\pi(\cdot|x)} \sum_t KL(\pi(\cdot|x,y_{<t}) \,\|\, \pi_{ref}(\cdot|x,y_{<t}))

    How R is estimated on a sample y is ``estimator``; value and gradient have separate properties, proved by
    enumeration in ``tests/test_kl_estimators.py`` and tabled in ``docs/explanation/kl-estimators.md``:

    ============= =============================== ==========================================================
    estimator     value                           gradient in expectation
    ============= =============================== ==========================================================
    ``tokenwise`` unbiased, never negative        without the prefixes' own dependence (formula above, y given)
    ``unbiased``  that of ``tokenwise``           of KL(policy || reference)
    ``k1``        unbiased, either sign           zero: it measures and does not regularise
    ``k2``        biased                          of KL(policy || reference)
    ``k3``        unbiased, never negative        of KL(reference || policy)
    ============= =============================== ==========================================================

    All this holds for samples of the *current* policy at temperature 1. Samples are drawn every ``refresh_every``
    optimiser steps and reused, which makes both value and gradient of any estimator stale by up to that many steps.
    A sample cut at ``max_new_tokens`` counts as a prefix: R is the KL of responses cut there, a lower bound of the
    KL of whole ones. The baseline of ``unbiased`` is taken over the samples that are forwarded together, so
    micro-batches and devices change its variance, and not its expectation.

    Args:
        weight: coefficient of R, or ``"beta"`` to follow the beta schedule.
        refresh_every: optimiser steps between two drawings of samples.
        num_samples: sequences in the buffer, one per training prompt drawn, over all ranks.
        batch_size: buffered sequences used in each optimiser step, over all ranks.
        max_new_tokens: length limit of a sample, in tokens.
        estimator: a name of the table above.

    Raises:
        ValueError: a count is not positive, ``batch_size`` exceeds ``num_samples``, or there is no such estimator.
    """

    source: ClassVar[Literal["policy"]] = "policy"

    def __init__(
        self,
        weight: Weight,
        refresh_every: PositiveInt,
        num_samples: PositiveInt,
        batch_size: PositiveInt,
        max_new_tokens: PositiveInt,
        estimator: KLEstimator,
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
        if estimator not in KL_ESTIMATORS:
            raise ValueError(f"regularizer.estimator={estimator}: choose one of {', '.join(KL_ESTIMATORS)}")
        self.refresh_every = refresh_every
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.estimator = estimator
