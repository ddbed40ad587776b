"""Kahneman-Tversky Optimization."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spo.bounds import NonNegativeFloat
from spo.losses.base import LabelledLoss
from spo.losses.declarations import Mismatched, Role
from spo.types import LabelledLogps


class KTOLoss(LabelledLoss):
    r"""KTO, arXiv:2402.01306, eq. 7 and 8.

    .. math:: L = \lambda_D \left(1 - \sigma(\beta [u - z])\right) \text{ if } y \text{ is desirable, else }
              \lambda_U \left(1 - \sigma(\beta [z - u])\right)

    where u is the *summed* log-ratio of policy and reference, ``(B,)``, and z is the mean of u over completions of
    other prompts, not below 0 and constant in the gradient: an estimate of the KL between the two models. It is taken
    over all rows of an optimizer step.

    Args:
        desirable_weight: Weight lambda_D of desirable completions.
        undesirable_weight: Weight lambda_U of the others.
        skip_zeros: Leave log-ratios that are exactly zero out of the mean z, as HALOs does.

    Raises:
        ValueError: A weight is negative.
    """

    extra_completions: Mapping[str, Role] = {"mismatched": Mismatched()}
    extra_metrics: tuple[str, ...] = ("kto/kl",)
    full_batch = True

    def __init__(
        self,
        desirable_weight: NonNegativeFloat = 1.0,
        undesirable_weight: NonNegativeFloat = 1.0,
        skip_zeros: bool = False,
    ) -> None:
        if not (desirable_weight >= 0 and undesirable_weight >= 0):
            raise ValueError(f"weights must be >= 0, got {desirable_weight} and {undesirable_weight}")
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.skip_zeros = skip_zeros

    def reference_point(self, logps: LabelledLogps) -> Tensor:
        """Return z in nats, a scalar without gradient.

        Raises:
            ValueError: The reference log-probs of the mismatched completions are missing.
        """
        other = logps.extra["mismatched"]
        if other.reference is None:
            raise ValueError("KTO needs the reference log-probs of its mismatched completions")
        ratios = (other.policy - other.reference).detach()
        counted = ratios != 0 if self.skip_zeros else torch.ones_like(ratios, dtype=torch.bool)
        return (ratios.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)).clamp(min=0)

    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each completion."""
        if logps.reference is None:
            raise ValueError("KTO needs the reference")
        gain = beta * (logps.policy - logps.reference - self.reference_point(logps))
        desirable, undesirable = self.desirable_weight * (-gain).sigmoid(), self.undesirable_weight * gain.sigmoid()
        return torch.where(logps.label == 1, desirable, undesirable)

    def metrics(self, logps: LabelledLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of every loss, and the estimate z of the KL."""
        found = super().metrics(logps, alpha=alpha, beta=beta)
        return found | {"kto/kl": self.reference_point(logps).expand(len(logps))}
