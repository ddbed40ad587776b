"""Kahneman-Tversky Optimization: labelled completions, and mismatched ones for the divergence of the whole step."""

from __future__ import annotations

import torch
from torch import Tensor

from spo.losses import LabelledLoss, Mismatched
from spo.types import LabelledLogps


class KTOLoss(LabelledLoss):
    """KTO, arXiv:2402.01306, eq. 7."""

    extra_completions = {"mismatched": Mismatched()}
    full_batch = True

    def __init__(self, desirable_weight: float, undesirable_weight: float) -> None:
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        other = logps.extra["mismatched"]
        kl = (other.policy - other.reference).mean().clamp(min=0).detach()
        gain = beta * (logps.policy - logps.reference - kl)
        desirable = self.desirable_weight * (1 - gain.sigmoid())
        return torch.where(logps.label == 1, desirable, self.undesirable_weight * (1 - (-gain).sigmoid()))
