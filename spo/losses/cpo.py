"""Contrastive Preference Optimization."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import NonNegativeFloat
from spo.losses.base import PreferenceLoss
from spo.losses.margins import NLLMean, check_nll, chosen_nll, policy_margin
from spo.types import PairLogps


class CPOLoss(PreferenceLoss):
    r"""CPO, arXiv:2401.08417.

    .. math:: L = -\log\sigma(\beta d) - \lambda \log\pi(y_w|x), \quad d = \log\pi(y_w|x) - \log\pi(y_l|x)

    where log-probabilities are *summed*, ``(B,)``. The first term is alpha times that of SPO with alpha = beta.

    Args:
        nll_weight: Weight lambda of the likelihood of the chosen completion.
        nll_mean: Denominator of the likelihood: none (``sum``), the tokens of each ``completion``, or those of the
            whole ``batch`` (TRL).

    Raises:
        ValueError: ``nll_weight`` is negative or ``nll_mean`` is unknown.
    """

    uses_reference = False

    def __init__(self, nll_weight: NonNegativeFloat = 1.0, nll_mean: NLLMean = "sum") -> None:
        check_nll(nll_weight, nll_mean)
        self.nll_weight, self.nll_mean = nll_weight, nll_mean
        self.full_batch = nll_mean == "batch"

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        preference = -logsigmoid(beta * policy_margin(pair))
        return preference + self.nll_weight * chosen_nll(pair, self.nll_mean)
