"""Identity Preference Optimization."""

from __future__ import annotations

from torch import Tensor

from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_log_ratios, per_token
from spo.losses.normalizer import normalized_per_token
from spo.types import PairLogps


class IPOLoss(PreferenceLoss):
    r"""IPO, arXiv:2310.12036, eq. 17; ``beta`` is the paper's tau.

    .. math:: L = \left(h - \frac{1}{2\tau}\right)^2, \quad
              h = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}

    where y_w and y_l are the chosen and the rejected completion, pi_ref is the reference, and all log-probabilities
    are ``(B,)``. Two conventions of h are in use: per-token averages of each completion's log-ratio (TRL, HALOs; the
    authors confirmed to TRL that their results use it), and sums (the original DPO repository).

    Args:
        length_normalize: Use per-token averages; if false, sums.
    """

    def __init__(self, length_normalize: bool = True) -> None:
        self.length_normalize = length_normalize

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = self._ratios(pair)
        return (chosen - rejected - 1 / (2 * beta)) ** 2

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return tau times the log-ratio in the convention of the loss, so that the target margin is 1/2."""
        chosen, rejected = self._ratios(pair)
        return beta * chosen, beta * rejected

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor:
        """Return log pi_ref + w / tau, normalized, where w(y) is how often y beats a uniform response.

        It is eq. 7 of arXiv:2310.12036. The expected loss is quadratic in the log-ratios f, and over uniform pairs its
        minimum is f = w / tau up to a constant. With sums, the constant is the normalizer. With per-token averages, f
        is the log-ratio over the length, so the constant times the length normalizes the policy.

        Raises:
            ValueError: ``length_normalize`` is true and ``lengths`` is ``None``.
        """
        wins = (rewards.unsqueeze(-1) - rewards.unsqueeze(-2)).sigmoid().mean(-1)
        if not self.length_normalize:
            return (reference_logps + wins / beta).log_softmax(-1)
        if lengths is None:
            raise ValueError("the optimum of IPO with length_normalize=true needs the lengths of the responses")
        return normalized_per_token(reference_logps + lengths * wins / beta, lengths)

    def _ratios(self, pair: PairLogps) -> tuple[Tensor, Tensor]:
        """Return the ``(B,)`` log-ratios of chosen and rejected in the convention of the loss."""
        ratios = both_log_ratios(pair)
        return per_token(pair, ratios) if self.length_normalize else ratios
