"""Soft Preference Optimization for full rankings."""

from __future__ import annotations

from torch import Tensor

from spo.losses.choices import SPOListLoss, choice_losses
from spo.types import ListLogps


class SPORankedLoss(SPOListLoss):
    r"""SPO for a full ranking, in the model of Plackett and Luce, arXiv:2405.00747.

    .. math:: L = -\frac{1}{\alpha} \sum_{k=1}^{n-1} \log \frac{\pi(y_k|x)^\alpha}{\sum_{j=k}^n \pi(y_j|x)^\alpha}

    where y_1 is the best completion and y_n the worst, log pi(y|x) is the *summed* log-probability, ``(B, n)``, and
    alpha > 0 is the softness. For n = 2 it is the loss of pairs.
    """

    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each list."""
        return choice_losses(lists, alpha).sum(-1)
