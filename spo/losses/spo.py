"""Soft Preference Optimization, basic and weighted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import NonNegativeFloat, PositiveFloat
from spo.losses.base import PreferenceLoss
from spo.losses.margins import policy_margin
from spo.types import PairLogps


class SPOLoss(PreferenceLoss):
    r"""Preference term of SPO, arXiv:2405.00747.

    .. math:: L = -\frac{1}{\alpha} \log \frac{\pi(y_w|x)^\alpha}{\pi(y_w|x)^\alpha + \pi(y_l|x)^\alpha}
                = -\frac{1}{\alpha} \log \sigma(\alpha d), \quad d = \log\pi(y_w|x) - \log\pi(y_l|x)

    where y_w and y_l are the chosen and the rejected completion, log pi(y|x) is the *summed* log-probability,
    ``(B,)``, and alpha > 0 is the softness. The loss does not use a reference: the KL to it is the regularizer's part.
    Under Bradley-Terry preferences with full support the minimizer is softmax(r / alpha). Soft labels enter as the
    expectation over the label.
    """

    uses_reference: bool = False
    uses_alpha: bool = True
    uses_beta: bool = False

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        return -logsigmoid(alpha * policy_margin(pair)) / alpha

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor:
        """Return log softmax(r / alpha): the loss of each pair is least where alpha d is its difference in reward.

        Weights of pairs do not move it, if they are positive, symmetric in the two responses, and constant in the
        gradient.
        """
        return (rewards / alpha).log_softmax(-1)

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return alpha log pi(y|x), whose difference is the logit of SPO's preference probability."""
        rejected = pair.policy_rejected
        return alpha * pair.policy_chosen, None if rejected is None else alpha * rejected


class WeightedSPOLoss(SPOLoss):
    r"""Weighted SPO, arXiv:2405.00747: pairs that the policy finds improbable count less.

    .. math:: L = \mu \, L_{SPO}, \quad \mu \propto (\pi(y_w|x) + \pi(y_l|x))^\gamma

    where mu is ``(B,)``, constant in the gradient, and has mean 1 over all pairs of the optimizer step, whatever the
    micro-batches and processes, or over all pairs of the split in a validation. It is computed in log space, because
    sequence probabilities span hundreds of nats, and log mu stays within ``clip`` nats of its mean. The weight is a
    reconstruction from the reviews of the paper. Any positive weight that is symmetric in the pair and constant in the
    gradient leaves the optimum at softmax(r / alpha).

    Args:
        gamma: Exponent of the weight; 0 is exactly the basic loss.
        clip: Largest distance of log mu from its mean in nats.

    Raises:
        ValueError: ``gamma`` is negative or ``clip`` is not positive.
    """

    full_batch: bool = True

    def __init__(self, gamma: NonNegativeFloat = 0.1, clip: PositiveFloat = 3.0) -> None:
        if not (gamma >= 0 and clip > 0):
            raise ValueError(f"gamma must be >= 0 and clip > 0, got gamma={gamma}, clip={clip}")
        self.gamma, self.clip = gamma, clip

    def weights(self, pair: PairLogps) -> Tensor:
        """Return the ``(B,)`` weights mu, detached and with mean 1."""
        if pair.policy_rejected is None:
            raise ValueError("the weight needs both completions, but policy_rejected is None")
        log_mu = self.gamma * torch.logaddexp(pair.policy_chosen.detach(), pair.policy_rejected.detach())
        log_mu = (log_mu - log_mu.mean()).clamp(-self.clip, self.clip)
        mu = (log_mu - log_mu.max()).exp()
        return mu / mu.mean()

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        return self.weights(pair) * super().of_pairs(pair, alpha=alpha, beta=beta)
