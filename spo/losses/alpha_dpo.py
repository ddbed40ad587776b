"""Alpha-DPO: a reference-free loss whose target margin depends on the reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from spo.bounds import NonNegativeFloat
from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_log_ratios, both_policy_logps, per_token
from spo.types import PairLogps

DECAY = 0.9
"""Share of the old value in an update of the running statistics, as in the official code."""


class AlphaDPOLoss(PreferenceLoss, nn.Module):
    r"""Alpha-DPO, arXiv:2410.10148.

    .. math:: L = -\log\sigma\left(\beta \left[\bar d - \left(\alpha z + \gamma/\beta\right)\right]\right), \quad
              z = \frac{M - m}{s}, \quad \bar d = \frac{\log\pi(y_w|x)}{|y_w|} - \frac{\log\pi(y_l|x)}{|y_l|}

    where M is the margin of DPO with per-token averages, ``(B,)``, and m and s are its running mean and standard
    deviation. The bracket that is subtracted is constant in the gradient. With alpha = 0 the loss is SimPO. As in the
    official code, the statistics take in a batch before it is used, begin at zero, and are not corrected for that, so
    the first z are about ten times too large. A step with a single pair does not have a deviation and leaves s as it
    was; where s is zero, z is zero. With a soft label p, M counts in m and s with p, and -M with 1 - p.

    Args:
        reference_weight: Weight alpha of the reference's part of the target margin.
        gamma_beta_ratio: Constant part gamma/beta of the target margin.
        correct_bias: Correct the statistics for their start at zero. The official code does not.

    Raises:
        ValueError: A weight is negative.
    """

    def __init__(
        self,
        reference_weight: NonNegativeFloat = 0.2,
        gamma_beta_ratio: NonNegativeFloat = 0.6,
        correct_bias: bool = False,
    ) -> None:
        super().__init__()
        if not (reference_weight >= 0 and gamma_beta_ratio >= 0):
            raise ValueError(
                f"reference_weight and gamma_beta_ratio must be >= 0, got {reference_weight} and {gamma_beta_ratio}"
            )
        self.reference_weight, self.gamma_beta_ratio = reference_weight, gamma_beta_ratio
        self.correct_bias = correct_bias
        self.mean: Tensor
        self.std: Tensor
        self.updates: Tensor
        for name in ("mean", "std", "updates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def update_statistics(self, logps: PairLogps) -> None:
        """Update the running mean and deviation of the margins, whose signs are those of the labels."""
        margins = self._margins(logps).to(self.mean)
        right = torch.ones_like(margins) if logps.preference is None else logps.preference.to(margins)
        mean = ((2 * right - 1) * margins).mean()
        self.mean.lerp_(mean, 1 - DECAY)
        if len(margins) > 1:
            squares = right * (margins - mean) ** 2 + (1 - right) * (margins + mean) ** 2
            self.std.lerp_((squares.sum() / (len(margins) - 1)).sqrt(), 1 - DECAY)
        self.updates += 1

    def target_margins(self, pair: PairLogps) -> Tensor:
        """Return the ``(B,)`` target margins alpha z + gamma/beta, without gradient."""
        margins = self._margins(pair).detach()
        scale = 1 - DECAY**self.updates if self.correct_bias else torch.ones_like(self.updates)
        scale = scale.clamp(min=1e-12)
        mean, std = (self.mean / scale).to(margins), (self.std / scale).to(margins)
        z = torch.where(std > 0, (margins - mean) / torch.where(std > 0, std, 1), 0)
        return self.reference_weight * z + self.gamma_beta_ratio

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = per_token(pair, both_policy_logps(pair))
        return -logsigmoid(beta * (chosen - rejected - self.target_margins(pair)))

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return beta (log pi - alpha (log pi - log pi_ref)) per token, the rewards of the official code."""
        policy, ratios = per_token(pair, both_policy_logps(pair)), per_token(pair, both_log_ratios(pair))
        chosen, rejected = (beta * (p - self.reference_weight * u) for p, u in zip(policy, ratios, strict=True))
        return chosen, rejected

    def _margins(self, pair: PairLogps) -> Tensor:
        chosen, rejected = per_token(pair, both_log_ratios(pair))
        return chosen - rejected
