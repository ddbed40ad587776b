"""DPO with the likelihood of the chosen completion added."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import NonNegativeFloat
from spo.losses.base import PreferenceLoss
from spo.losses.margins import NLLMean, check_nll, chosen_nll, log_ratio_margin
from spo.types import PairLogps


class DPONLLLoss(PreferenceLoss):
    r"""DPO + NLL: the loss of Iterative RPO, arXiv:2404.19733, eq. 1, and of arXiv:2405.16436.

    .. math:: L = -\log\sigma(\beta h) - \eta \frac{\log\pi(y_w|x)}{|y_w|}

    where h is the margin of DPO, ``(B,)``.

    Args:
        nll_weight: Weight eta of the likelihood; 0 is DPO.
        nll_mean: Denominator of the likelihood: none (``sum``), the tokens of each ``completion``, or those of the
            whole ``batch`` (TRL).

    Raises:
        ValueError: ``nll_weight`` is negative or ``nll_mean`` is unknown.
    """

    def __init__(self, nll_weight: NonNegativeFloat = 1.0, nll_mean: NLLMean = "completion") -> None:
        check_nll(nll_weight, nll_mean)
        self.nll_weight, self.nll_mean = nll_weight, nll_mean
        self.full_batch = nll_mean == "batch"

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        return -logsigmoid(beta * log_ratio_margin(pair)) + self.nll_weight * chosen_nll(pair, self.nll_mean)
