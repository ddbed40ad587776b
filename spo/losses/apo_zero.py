"""APO-zero."""

from __future__ import annotations

from torch import Tensor

from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_log_ratios
from spo.types import PairLogps


class APOZeroLoss(PreferenceLoss):
    r"""APO-zero, arXiv:2408.06266: raise the chosen completion and lower the rejected one, each by itself.

    .. math:: L = 1 - \sigma(r_w) + \sigma(r_l), \quad r = \beta \log\frac{\pi(y|x)}{\pi_{ref}(y|x)}

    where log-probabilities are *summed*, ``(B,)``. For pairs whose chosen completion is better than the model's own.
    """

    no_optimum = "it is least where responses that lose more often than they win have probability 0"

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = both_log_ratios(pair)
        return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()
