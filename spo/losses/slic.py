"""Sequence Likelihood Calibration."""

from __future__ import annotations

from torch import Tensor

from spo.bounds import NonNegativeFloat
from spo.losses.base import PreferenceLoss
from spo.losses.margins import chosen_nll, policy_margin
from spo.types import PairLogps


class SLiCLoss(PreferenceLoss):
    r"""SLiC-HF, arXiv:2305.10425: a margin between the log-probabilities, and the likelihood of the chosen completion.

    ``beta`` is the paper's margin delta, in nats.

    .. math:: L = \max(0, \delta - \log\pi(y_w|x) + \log\pi(y_l|x)) - \lambda \log\pi(y_w|x)

    where log-probabilities are *summed*, ``(B,)``.

    Args:
        nll_weight: Weight lambda of the likelihood.

    Raises:
        ValueError: ``nll_weight`` is negative.
    """

    uses_reference = False
    no_optimum = "its slope jumps at the minimum, which is a corner"

    def __init__(self, nll_weight: NonNegativeFloat = 0.1) -> None:
        if not nll_weight >= 0:
            raise ValueError(f"nll_weight must be >= 0, got {nll_weight}")
        self.nll_weight = nll_weight

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        return (beta - policy_margin(pair)).relu() + self.nll_weight * chosen_nll(pair)

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return log pi(y|x), whose difference the margin bounds."""
        return pair.policy_chosen, pair.policy_rejected
