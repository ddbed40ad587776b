"""The reference-free hinge loss that RSO compares with."""

from __future__ import annotations

from torch import Tensor

from spo.losses.base import PreferenceLoss
from spo.losses.margins import policy_margin
from spo.types import PairLogps


class RSOHingeLoss(PreferenceLoss):
    r"""Hinge loss of RSO, arXiv:2309.06657, which is that of SLiC with margin 1/beta; ``beta`` is the paper's gamma.

    .. math:: L = \max(0, 1 - \beta d), \quad d = \log\pi(y_w|x) - \log\pi(y_l|x)

    where log-probabilities are *summed*, ``(B,)``. The losses of RSO with a reference are ``method=dpo``
    (sigmoid-norm) and ``method=hinge`` (hinge-norm).
    """

    uses_reference = False
    no_optimum = "its slope jumps at the minimum, which is a corner"

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        return (1 - beta * policy_margin(pair)).relu()
