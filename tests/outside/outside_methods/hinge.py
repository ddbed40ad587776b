"""The hinge loss of RSO and SLiC, with a metric of its own."""

from __future__ import annotations

from torch import Tensor

from spo.losses import PreferenceLoss
from spo.types import PairLogps


class HingeLoss(PreferenceLoss):
    """Normalized hinge loss, arXiv:2309.06657, and the share of pairs that still have a gradient."""

    extra_metrics = ("hinge/active",)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        chosen, rejected = self.rewards(pair, alpha=alpha, beta=beta)
        return (1 - (chosen - rejected)).clamp(min=0)

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        metrics = super().metrics(pair, alpha=alpha, beta=beta)
        return metrics | {"hinge/active": (metrics["rewards/margins"] < 1).float()}
