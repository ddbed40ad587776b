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
from spo.losses.normalizer import normalized
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

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor | None:
        """Return pi_ref times the u at which f'(e^u) = r / beta + c, with the c of each prompt at which it sums to one.

        The loss of each pair is least there, since f' then differs as r / beta does. An alpha-divergence of order above
        1 gives ``None`` where the least reward would need a probability below 0 (arXiv:2309.16240, theorem 1).
        """
        scaled = rewards / beta
        # All u are functions of the distance to the end of the interval of c, so that it keeps its digits near 0.
        best, worst = scaled.amax(-1, keepdim=True), scaled.amin(-1, keepdim=True)
        zero, one = torch.zeros_like(best), torch.ones_like(best)
        if self.divergence == "reverse_kl":
            return (reference_logps + scaled).log_softmax(-1)
        if self.divergence == "js":
            # log sigma(u) = -x, so u = -x - log(1 - exp(-x)), which is 0 at x = log 2.
            def of_js(distance: Tensor) -> Tensor:
                x = best - scaled + distance
                return reference_logps - x - (-(-x).expm1()).log()

            return normalized(of_js, math.log(2) * one, zero)
        order = self.divergence_alpha if self.divergence == "alpha" else 0.0  # The forward KL is order 0.
        scale = abs(order - 1)
        if order < 1:
            return normalized(
                lambda distance: reference_logps - (scale * (best - scaled + distance)).log() / scale, one / scale, zero
            )

        def above_one(distance: Tensor) -> Tensor:
            return reference_logps + (scale * (scaled - worst + distance)).log() / scale

        return normalized(above_one, zero, one / scale) if (above_one(zero).logsumexp(-1) <= 0).all() else None
