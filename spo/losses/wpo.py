"""Weighted Preference Optimization."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss
from spo.losses.declarations import Term
from spo.losses.margins import log_ratio_margin
from spo.types import PairLogps

if TYPE_CHECKING:
    from spo.objective import ScoredBatch


class WPOLoss(PreferenceLoss):
    r"""WPO, arXiv:2406.11827: DPO whose pairs count by how likely the policy would write them.

    .. math:: L = -w(y_w)\, w(y_l) \log\sigma(\beta h), \quad
              w(y) = \exp\left(\frac{1}{|y|} \sum_t \left[\log\pi(y_t|x, y_{<t})
              - \log\sum_v \pi(v|x, y_{<t})^2\right]\right)

    where h is the margin of DPO, ``(B,)``. The weights are constant in the gradient, are not normalized over the batch,
    and can exceed 1.
    """

    extra_metrics = ("wpo/weight",)

    def __init__(self) -> None:
        self.terms = {"likeness": Term(likeness)}

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        return -self.weights(pair) * logsigmoid(beta * log_ratio_margin(pair))

    def weights(self, pair: PairLogps) -> Tensor:
        """Return the ``(B,)`` weights of the pairs, without gradient."""
        return pair.terms["likeness"].detach().sum(0).exp()

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of every loss, and the weights."""
        return super().metrics(pair, alpha=alpha, beta=beta) | {"wpo/weight": self.weights(pair)}


@torch.no_grad()
def likeness(scored: ScoredBatch) -> Tensor:
    """Return ``(n, B)`` log w(y), the mean over tokens of how likely each is next to what the policy would write."""
    return scored.mean_per_completion(scored.policy_tokens - scored.policy_log_sum_squares)
