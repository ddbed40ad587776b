"""DPO with other divergences than the reverse KL."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import PositiveFloat
from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_log_ratios
from spo.types import PairLogps

FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


class FDPOLoss(PreferenceLoss):
    r"""f-DPO, arXiv:2309.16240: DPO for the regularizer D_f(pi || pi_ref).

    .. math:: L = -\log\sigma\left(\beta \left[f'(e^{u_w}) - f'(e^{u_l})\right]\right), \quad
              u = \log\frac{\pi(y|x)}{\pi_{ref}(y|x)}

    where log-probabilities are *summed*, ``(B,)``, and f' is, up to a constant, u for the reverse KL (which is DPO),
    -exp(-u) for the forward KL, log sigma(u) for the Jensen-Shannon divergence, and exp((a-1)u) / (a-1) for the
    alpha-divergence. Exponents stay below the logarithm of the largest number of the dtype, so that no loss overflows.

    Args:
        divergence: ``reverse_kl``, ``forward_kl``, ``js`` or ``alpha``.
        divergence_alpha: Order a of the alpha-divergence; it tends to the reverse KL as a tends to 1.

    Raises:
        ValueError: ``divergence`` is unknown, or ``divergence_alpha`` is not positive or is 1.
    """

    def __init__(self, divergence: FDivergence = "js", divergence_alpha: PositiveFloat = 0.5) -> None:
        if divergence not in get_args(FDivergence):
            raise ValueError(f"divergence must be one of {', '.join(get_args(FDivergence))}, got {divergence}")
        if not divergence_alpha > 0 or divergence_alpha == 1:
            raise ValueError(
                f"divergence_alpha must be positive and not 1, got {divergence_alpha}; 1 is divergence=reverse_kl"
            )
        self.divergence, self.divergence_alpha = divergence, divergence_alpha

    def slope(self, ratio: Tensor) -> Tensor:
        """Return f' of exp(u), up to a constant.

        Args:
            ratio: ``(B,)`` log-ratios u.
        """
        if self.divergence == "reverse_kl":
            return ratio
        if self.divergence == "js":
            return logsigmoid(ratio)
        # A quarter of the range leaves room for the difference of two, times beta.
        largest = math.log(torch.finfo(ratio.dtype).max) - math.log(4)
        if self.divergence == "forward_kl":
            return -(-ratio).clamp(max=largest).exp()
        order = self.divergence_alpha - 1
        return (order * ratio).clamp(max=largest + min(0.0, math.log(abs(order)))).exp() / order

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = both_log_ratios(pair)
        return -logsigmoid(beta * (self.slope(chosen) - self.slope(rejected)))

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return beta f' of the ratio of policy and reference."""
        chosen, rejected = both_log_ratios(pair)
        return beta * self.slope(chosen), beta * self.slope(rejected)
