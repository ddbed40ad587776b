"""Robust DPO."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss
from spo.losses.margins import log_ratio_margin
from spo.types import PairLogps


class RDPOLoss(PreferenceLoss):
    r"""Robust DPO, arXiv:2403.00409, the loss that is unbiased under flipped labels.

    .. math:: L = \frac{-(1-\epsilon) \log\sigma(\beta h) + \epsilon \log\sigma(-\beta h)}{1 - 2\epsilon}, \quad
              h = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}

    where epsilon is the share of flipped labels, and all log-probabilities are *summed*, ``(B,)``. The expectation of L
    over the flips is the loss of DPO on the true labels. L is unbounded below: it falls with slope
    epsilon beta / (1 - 2 epsilon) at large h, so long training needs early stopping.

    Args:
        label_smoothing: Share epsilon of flipped labels, in [0, 0.5). 0 is DPO.

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 0.5).
    """

    def __init__(self, label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.1) -> None:
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        logit, share = beta * log_ratio_margin(pair), self.label_smoothing
        return (share * logsigmoid(-logit) - (1 - share) * logsigmoid(logit)) / (1 - 2 * share)
