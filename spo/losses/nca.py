"""Noise Contrastive Alignment."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_log_ratios
from spo.types import PairLogps


class NCALoss(PreferenceLoss):
    r"""NCA on pairs, arXiv:2402.05369: absolute rewards instead of their difference.

    .. math:: L = -\log\sigma(r_w) - \frac{1}{2}\log\sigma(-r_w) - \frac{1}{2}\log\sigma(-r_l), \quad
              r = \beta \log\frac{\pi(y|x)}{\pi_{ref}(y|x)}

    where log-probabilities are *summed*, ``(B,)``.
    """

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = (beta * ratio for ratio in both_log_ratios(pair))
        return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2
