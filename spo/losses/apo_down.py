"""APO-down."""

from __future__ import annotations

from torch import Tensor

from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_log_ratios
from spo.types import PairLogps


class APODownLoss(PreferenceLoss):
    r"""APO-down, arXiv:2408.06266: lower both completions, the rejected one more.

    .. math:: L = \sigma(r_w) + 1 - \sigma(r_w - r_l), \quad r = \beta \log\frac{\pi(y|x)}{\pi_{ref}(y|x)}

    where log-probabilities are *summed*, ``(B,)``. For pairs whose chosen completion is worse than the model's own.
    """

    no_optimum = "its sigmoids saturate, so it still falls as probabilities tend to 0"

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = both_log_ratios(pair)
        return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()
