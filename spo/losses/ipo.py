"""Identity Preference Optimization."""

from __future__ import annotations

import torch
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

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor:
        """Pi_ref exp(w / tau), normalised, w(y) being how often y beats a uniform response (arXiv:2310.12036, eq. 7).

        The expected loss is quadratic in the log-ratios f: over uniform pairs its minimum is f = w / tau up to a
        constant. With sums the constant is the normaliser. Per token f is the log-ratio over the length, so the
        constant is found such that the policy sums to 1.

        Raises:
            ValueError: length_normalize is true and there are no lengths.
        """
        wins = (rewards.unsqueeze(-1) - rewards.unsqueeze(-2)).sigmoid().mean(-1)
        if not self.length_normalize:
            return (reference_logps + wins / beta).log_softmax(-1)
        if lengths is None:
            raise ValueError("the optimum of IPO with length_normalize=true needs the lengths of the responses")
        return _normalised(reference_logps + lengths * wins / beta, lengths)

    def _ratios(self, pair: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = log_ratios(pair)
        if rejected is None:
            raise ValueError("IPO compares two completions, but policy_rejected is None")
        if not self.length_normalize:
            return chosen, rejected
        if pair.chosen_length is None or pair.rejected_length is None:
            raise ValueError("IPO with length_normalize=true needs chosen_length and rejected_length")
        return chosen / pair.chosen_length, rejected / pair.rejected_length


def _normalised(logits: Tensor, lengths: Tensor) -> Tensor:
    """``logits + c lengths`` with the one c per row at which the exponentials sum to 1, by bisection."""
    total = logits.logsumexp(-1, keepdim=True)
    # At -total / shortest or -total / longest the sum is on either side of 1: lengths are positive.
    ends = torch.cat([-total / lengths.amin(-1, keepdim=True), -total / lengths.amax(-1, keepdim=True)], -1)
    low, high = ends.amin(-1, keepdim=True), ends.amax(-1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        above = (logits + middle * lengths).logsumexp(-1, keepdim=True) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (logits + (low + high) / 2 * lengths).log_softmax(-1)
