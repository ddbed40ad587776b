"""Soft Preference Optimization, basic and weighted."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import NonNegativeFloat, PositiveFloat
from spo.losses.base import PreferenceLoss, expected_loss, policy_margin, weighted
from spo.types import PairLogps


class SPOLoss(PreferenceLoss):
    r"""Preference term of SPO, arXiv:2405.00747.

    .. math:: L = -\frac{1}{\alpha} \log \frac{\pi(y_w|x)^\alpha}{\pi(y_w|x)^\alpha + \pi(y_l|x)^\alpha}
                = -\frac{1}{\alpha} \log \sigma(\alpha d), \quad d = \log\pi(y_w|x) - \log\pi(y_l|x)

    with d from *summed* log-probabilities, ``(B,)``. No reference enters; under Bradley-Terry preferences with full
    support the minimiser is softmax(r / alpha), so alpha is the softness of the policy. The KL to the reference is
    the regularizer's part. Soft labels enter as the expectation over the label.
    """

    uses_reference: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = True
    uses_beta: ClassVar[bool] = False

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        losses = expected_loss(lambda d: -logsigmoid(alpha * d) / alpha, policy_margin(pair), pair.preference)
        return weighted(losses, pair)

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor:
        """Softmax(r / alpha): every pair's loss is least where alpha d is the pair's difference in reward.

        A weight of the pair that is positive and symmetric in its two responses, and held constant in the gradient,
        does not move it.
        """
        return (rewards / alpha).log_softmax(-1)

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Alpha log pi(y|x): their difference is the logit of SPO's preference probability."""
        rejected = pair.policy_rejected
        return alpha * pair.policy_chosen, None if rejected is None else alpha * rejected


class WeightedSPOLoss(SPOLoss):
    r"""SPO with pairs weighted by the mass that the policy gives them, so that improbable pairs count less.

    .. math:: \mu \propto (\pi(y_w|x) + \pi(y_l|x))^\gamma

    under stop-gradient, normalised to mean 1 over the pairs forwarded together and computed in log space:
    sequence probabilities span hundreds of nats, so the logarithm of mu is held within ``clip`` nats of its mean.
    The paper's weight is known to us from its reviews only; this is a reconstruction. Any symmetric positive weight
    under stop-gradient leaves the optimum at softmax(r / alpha).

    Args:
        gamma: exponent; 0 is exactly the basic loss.
        clip: largest distance of log mu from the batch mean, in nats.

    Raises:
        ValueError: gamma is negative or clip is not positive.
    """

    uses_batch_statistics: ClassVar[bool] = True

    def __init__(self, gamma: NonNegativeFloat = 0.1, clip: PositiveFloat = 3.0) -> None:
        if not (gamma >= 0 and clip > 0):
            raise ValueError(f"gamma must be >= 0 and clip > 0, got gamma={gamma}, clip={clip}")
        self.gamma, self.clip = gamma, clip

    def weights(self, pair: PairLogps) -> Tensor:
        """``(B,)`` mu, detached, mean 1."""
        if pair.policy_rejected is None:
            raise ValueError("the weight needs both completions, but policy_rejected is None")
        log_mu = self.gamma * torch.logaddexp(pair.policy_chosen.detach(), pair.policy_rejected.detach())
        log_mu = (log_mu - log_mu.mean()).clamp(-self.clip, self.clip)
        mu = (log_mu - log_mu.max()).exp()
        return mu / mu.mean()

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return self.weights(pair) * super().__call__(pair, alpha=alpha, beta=beta)
