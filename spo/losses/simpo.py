"""Simple Preference Optimization."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import NonNegativeFloat
from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_policy_logps, per_token
from spo.losses.normalizer import normalized_per_token
from spo.types import PairLogps


class SimPOLoss(PreferenceLoss):
    r"""SimPO, arXiv:2405.14734, eq. 6.

    .. math:: L = -\log\sigma\left(\beta \left[\frac{\log\pi(y_w|x)}{|y_w|} - \frac{\log\pi(y_l|x)}{|y_l|}\right]
                  - \gamma\right)

    where log-probabilities are summed over the tokens of a completion and divided by their number, ``(B,)``.

    Args:
        gamma_beta_ratio: Target margin gamma, divided by beta.

    Raises:
        ValueError: ``gamma_beta_ratio`` is negative.
    """

    uses_reference = False

    def __init__(self, gamma_beta_ratio: NonNegativeFloat = 0.55) -> None:
        if not gamma_beta_ratio >= 0:
            raise ValueError(f"gamma_beta_ratio must be >= 0, got {gamma_beta_ratio}")
        self.gamma_beta_ratio = gamma_beta_ratio

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = per_token(pair, both_policy_logps(pair))
        return -logsigmoid(beta * (chosen - rejected) - beta * self.gamma_beta_ratio)

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return beta times the mean log-probability of a token."""
        chosen, rejected = per_token(pair, both_policy_logps(pair))
        return beta * chosen, beta * rejected

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor | None:
        """Return |y| (r / beta + c) without a target margin, as for length-normalized DPO, else ``None``.

        With a margin no reward explains the labels: both orders of a pair ask for it.

        Raises:
            ValueError: ``lengths`` is ``None``.
        """
        if lengths is None:
            raise ValueError("the optimum of SimPO needs the lengths of the responses")
        return None if self.gamma_beta_ratio else normalized_per_token(lengths * rewards / beta, lengths)
