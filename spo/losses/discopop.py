"""DiscoPOP, the loss that a language model discovered."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import PositiveFloat
from spo.losses.base import PreferenceLoss
from spo.losses.margins import log_ratio_margin
from spo.types import PairLogps


class DiscoPOPLoss(PreferenceLoss):
    r"""DiscoPOP (log-ratio modulated loss), arXiv:2406.08414: a mixture of the logistic and the exponential loss.

    .. math:: L = -(1 - m) \log\sigma(q) + m \exp(-q), \quad q = \beta h, \quad m = \sigma(q / \tau)

    where h is the margin of DPO, ``(B,)``; gradients flow through m too. The loss is not monotone: at h = 0 it grows
    with h. The exponential has a factor m that vanishes where it is large, so their product is computed as one
    exponential and does not overflow where q is negative and tau below 1.

    Args:
        temperature: Temperature tau of the mixture.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    no_optimum = "it is not monotone, and has several minima"

    def __init__(self, temperature: PositiveFloat = 0.05) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        logit = beta * log_ratio_margin(pair)
        mixture = logit / self.temperature
        # With a temperature above 1 the product overflows as -logit grows: the exponent stays where it is finite.
        largest = math.log(torch.finfo(logit.dtype).max) - 1
        exponential = (logsigmoid(mixture) - logit).clamp(max=largest).exp()
        return exponential - (-mixture).sigmoid() * logsigmoid(logit)
