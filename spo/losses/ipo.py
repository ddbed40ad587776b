"""Identity Preference Optimization."""

from __future__ import annotations

from torch import Tensor

from spo.losses.base import PreferenceLoss, expected_loss, log_ratios, reference_margin, weighted
from spo.types import PairLogps


class IPOLoss(PreferenceLoss):
    r"""IPO, arXiv:2310.12036, eq. 17; ``beta`` is the paper's tau.

    .. math:: L = \left(h - \frac{1}{2\tau}\right)^2, \quad
              h = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}

    Two conventions are in use: h from per-token averages of each completion's log-ratio (TRL, HALOs; confirmed to
    TRL by the authors as the one behind their results), and h from sums (the original DPO repository).

    Args:
        length_normalize: true for per-token averages, false for sums.
    """

    def __init__(self, length_normalize: bool = True) -> None:
        self.length_normalize = length_normalize

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        reference_margin(pair)  # says which log-probability is missing
        chosen, rejected = self._ratios(pair)
        return weighted(expected_loss(lambda h: (h - 1 / (2 * beta)) ** 2, chosen - rejected, pair.preference), pair)

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Tau times the log-ratio in the loss's own convention, so that its target margin is 1/2."""
        chosen, rejected = self._ratios(pair)
        return beta * chosen, beta * rejected

    def _ratios(self, pair: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = log_ratios(pair)
        if rejected is None:
            raise ValueError("IPO compares two completions, but policy_rejected is None")
        if not self.length_normalize:
            return chosen, rejected
        if pair.chosen_length is None or pair.rejected_length is None:
            raise ValueError("IPO with length_normalize=true needs chosen_length and rejected_length")
        return chosen / pair.chosen_length, rejected / pair.rejected_length
