"""Calibration of a method's implicit reward as a probability of preference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric


class Calibration(Metric):
    """Calibration of sigmoid(margin) as the probability that chosen is preferred, for hard and soft labels.

    The confidence of a pair is the larger of sigmoid(margin) and sigmoid(-margin). It is right with the probability
    that the label gives to that side, so the order of a pair does not matter. Sums over bins are kept in float64 and
    reduced once.

    Args:
        bins: Number of bins of equal width, over confidences from 0.5 to 1.
        over_ranks: Whether to reduce over processes; false where one process computes alone.
    """

    full_state_update = False
    confidence: Tensor
    right: Tensor
    count: Tensor
    brier: Tensor
    log_loss: Tensor

    def __init__(self, bins: int = 10, over_ranks: bool = True) -> None:
        super().__init__(sync_on_compute=over_ranks)
        self.bins = bins
        for name, size in (("confidence", bins), ("right", bins), ("count", 1), ("brier", 1), ("log_loss", 1)):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), "sum")

    def update(self, margin: Tensor, preference: Tensor | None = None) -> None:
        """Add pairs.

        Args:
            margin: ``(B,)`` implicit reward of chosen minus that of rejected.
            preference: ``(B,)`` probability that chosen is the better one; ``None`` for 1.
        """
        margin = margin.detach().double()
        label = torch.ones_like(margin) if preference is None else preference.double()
        confidence, right = margin.abs().sigmoid(), torch.where(margin >= 0, label, 1 - label)
        right = right.where(margin != 0, 0.5)
        place = ((confidence - 0.5) * 2 * self.bins).long().clamp(max=self.bins - 1)
        self.confidence.index_add_(0, place, confidence)
        self.right.index_add_(0, place, right)
        self.count += len(margin)
        self.brier += (margin.sigmoid() - label).square().sum()
        self.log_loss += (functional.softplus(-margin) * label + functional.softplus(margin) * (1 - label)).sum()

    def compute(self) -> dict[str, float]:
        """Return expected calibration error, Brier score and log loss in nats per pair; empty without pairs."""
        count = float(self.count)
        if count == 0:
            return {}
        return {
            "ece": float((self.confidence - self.right).abs().sum()) / count,
            "brier": float(self.brier) / count,
            "log_loss": float(self.log_loss) / count,
        }
