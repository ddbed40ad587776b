"""Minor DPO."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_log_ratios
from spo.types import PairLogps


class MinorDPOLoss(PreferenceLoss):
    r"""MinorDPO, arXiv:2408.09834: the rejected completion is penalized only while it is likelier than before.

    .. math:: L = -\log\sigma\left(\beta \left[\log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}
                  - \max\left(0, \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}\right)\right]\right)

    where log-probabilities are *summed*, ``(B,)``. Where both models agree on y_l, its slope is 0. The formula is a
    reconstruction from two descriptions by others; the paper's equation was not read.
    """

    no_optimum = "its slope jumps where a log-ratio is 0, and the minimum is there"

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = both_log_ratios(pair)
        return -logsigmoid(beta * (chosen - rejected.relu()))
