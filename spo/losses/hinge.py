"""The hinge loss with a reference."""

from __future__ import annotations

from torch import Tensor

from spo.losses.base import PreferenceLoss
from spo.losses.margins import log_ratio_margin
from spo.types import PairLogps


class HingeLoss(PreferenceLoss):
    r"""Hinge-norm loss of RSO, arXiv:2309.06657; ``beta`` is the paper's gamma.

    .. math:: L = \max(0, 1 - \beta h), \quad
              h = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}

    where log-probabilities are *summed*, ``(B,)``. It is also the hinge variant of SPIN (arXiv:2401.01335).
    """

    extra_metrics = ("hinge/active",)
    no_optimum = "its slope jumps at the minimum, which is a corner"

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        return (1 - beta * log_ratio_margin(pair)).relu()

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of every loss, and whether a pair still has a gradient."""
        metrics = super().metrics(pair, alpha=alpha, beta=beta)
        return metrics | {"hinge/active": (metrics["rewards/margins"] < 1).float()}
