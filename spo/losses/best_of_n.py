"""Soft Preference Optimization for the best of n completions."""

from __future__ import annotations

from torch import Tensor

from spo.losses.choices import SPOListLoss, choice_losses
from spo.types import ListLogps


class SPOBestOfNLoss(SPOListLoss):
    r"""SPO for the best completion of a prompt among n, arXiv:2405.00747.

    .. math:: L = -\frac{1}{\alpha} \log \frac{\pi(y^*|x)^\alpha}{\sum_{i=1}^n \pi(y_i|x)^\alpha}

    where y* is the best of the completions y_1, ..., y_n, log pi(y|x) is the *summed* log-probability, ``(B, n)``, and
    alpha > 0 is the softness. The order of the other completions is not used. For n = 2 it is the loss of pairs.
    """

    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each list."""
        return choice_losses(lists, alpha)[:, 0]
