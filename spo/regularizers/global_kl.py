"""SPO's regularizer: the KL over the model's whole output distribution."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from spo.bounds import PositiveInt
from spo.ops import KL_ESTIMATORS, KLEstimator, Logits
from spo.regularizers.base import SampleRegularizer, Weight
from spo.types import Sequences


class GlobalKL(SampleRegularizer):
    r"""KL(policy || reference) on samples of the policy, arXiv:2405.00747.

    .. math:: R = E_x E_{y\sim\pi(\cdot|x)} \sum_t KL(\pi(\cdot|x,y_{<t}) \,\|\, \pi_{ref}(\cdot|x,y_{<t}))

    That R is estimated on tokens, with a bias and a low variance, is confirmed by reviews of the paper. The formula of
    ``tokenwise`` is our reading. ``estimator`` says how R is estimated on a sample y. Value and gradient have separate
    properties, proved by enumeration in ``tests/test_kl_estimators.py`` and tabulated in
    ``docs/explanation/kl-estimators.md``:

    ============= =============================== ==========================================================
    estimator     value                           gradient in expectation
    ============= =============================== ==========================================================
    ``tokenwise`` unbiased, never negative        without the prefixes' own dependence (formula above, y given)
    ``unbiased``  that of ``tokenwise``           of KL(policy || reference)
    ``k1``        unbiased, either sign           zero: it measures and does not regularize
    ``k2``        biased                          of KL(policy || reference)
    ``k3``        unbiased, never negative        of KL(reference || policy)
    ============= =============================== ==========================================================

    All this holds for samples of the *current* policy at temperature 1. Samples are drawn every ``refresh_every``
    optimizer steps and reused, so value and gradient of every estimator are stale by up to that many steps. A sample
    cut at ``max_new_tokens`` counts as a prefix: R is then the KL of responses cut there, a lower bound of the KL of
    whole ones. The baseline of ``unbiased`` is taken over the samples of one forward pass, so micro-batches and devices
    change its variance, and not its expectation.

    Args:
        weight: Coefficient of R, or ``"beta"`` to follow the beta schedule.
        refresh_every: Optimizer steps between two drawings of samples.
        num_samples: Sequences in the buffer, one per prompt drawn, over all processes.
        batch_size: Buffered sequences used in each optimizer step, over all processes.
        max_new_tokens: Length limit of a sample, in tokens.
        estimator: Name in the table above.
        prompts: Prompts x to sample for: those of the split ``"train"`` or ``"selection"``, those without pairs
            (``"unlabeled"``), or a file.

    Raises:
        ValueError: A count is not positive, ``batch_size`` exceeds ``num_samples``, or the estimator is unknown.
    """

    probe_metric: ClassVar[str] = "kl"

    def __init__(
        self,
        weight: Weight,
        refresh_every: PositiveInt,
        num_samples: PositiveInt,
        batch_size: PositiveInt,
        max_new_tokens: PositiveInt,
        estimator: KLEstimator,
        prompts: str = "train",
    ) -> None:
        super().__init__(weight, refresh_every, num_samples, batch_size, max_new_tokens, prompts)
        if estimator not in KL_ESTIMATORS:
            raise ValueError(f"regularizer.estimator={estimator}: choose one of {', '.join(KL_ESTIMATORS)}")
        self.estimator = estimator

    def __call__(self, policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
        """Return ``(N,)`` nats, see :class:`SampleRegularizer`."""
        return KL_ESTIMATORS[self.estimator](policy_logits, reference_logits, sequences)

    def kl_weight(self, beta: float) -> float:
        """Return the coefficient of the KL, which every estimator is meant for."""
        return self.weight_at(beta)
