"""Alpha-SPIN: self-play whose opponent is mixed with the base policy."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import Fraction
from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_log_ratios, both_policy_logps
from spo.types import PairLogps


class AlphaSPINLoss(PreferenceLoss):
    r"""Alpha-SPIN, arXiv:2404.04291: SPIN against a geometric mixture of the last and the base policy.

    .. math:: L = -\log\sigma\left(\beta \left[\log\frac{\pi(y_w|x)}{g(y_w|x)}
                  - \log\frac{\pi(y_l|x)}{g(y_l|x)}\right]\right), \quad
              \log g = (1 - a) \log\pi_t + a \log b

    where y_w is a person's answer, y_l is a sample of the policy pi_t at the start of the round (the reference), and b
    is the base policy (``extra_references.base``). Log-probabilities are *summed*, ``(B,)``, and the normalizer of g
    cancels. Which side a stands on, and beta in front, are a reconstruction from the abstract and two summaries.

    Args:
        base_weight: Weight a of the base policy; 0 is SPIN.

    Raises:
        ValueError: ``base_weight`` is outside [0, 1].
    """

    extra_references = ("base",)

    def __init__(self, base_weight: Fraction = 0.5) -> None:
        if not 0 <= base_weight <= 1:
            raise ValueError(f"base_weight must be in [0, 1], got {base_weight}")
        self.base_weight = base_weight

    def _ratios(self, pair: PairLogps) -> tuple[Tensor, Tensor]:
        """Return the ``(B,)`` log-ratios of the policy to the mixture."""
        of_last, policy, base = both_log_ratios(pair), both_policy_logps(pair), pair.references["base"]
        chosen, rejected = (
            (1 - self.base_weight) * ratio + self.base_weight * (logp - of_base)
            for ratio, logp, of_base in zip(of_last, policy, base, strict=True)
        )
        return chosen, rejected

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = self._ratios(pair)
        return -logsigmoid(beta * (chosen - rejected))

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return beta times the log-ratio to the mixture."""
        chosen, rejected = self._ratios(pair)
        return beta * chosen, beta * rejected
