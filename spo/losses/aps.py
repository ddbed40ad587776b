"""Adaptive Preference Scaling, also known as Ada-DPO."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import PositiveFloat
from spo.losses.base import PreferenceLoss
from spo.losses.margins import log_ratio_margin
from spo.types import PairLogps

BISECTIONS = 64
"""Halvings of the interval of a scale: more do not change a float64 number."""


class APSLoss(PreferenceLoss):
    r"""APS, arXiv:2406.02764, sections 3.1 to 3.6: DPO with a temperature for each pair, chosen by the loss itself.

    .. math:: L = \min_{t \in [t_0, t_{max}]} -t \log\sigma(\beta h / t) + \rho\, t

    where h is the margin of DPO, ``(B,)``. The paper's beta is 1, since 1/t takes its place. The quadratic form has
    rho_0 t^2 - t log 2 in place of rho t and no upper end. The minimum over t is found first, by bisection of the
    derivative, and t is constant in the gradient. A pair whose completions the policy separates clearly gets a large t.

    Args:
        form: ``linear`` or ``quadratic``.
        t_min: Smallest scale t_0.
        t_max: Largest scale of the linear form.
        rho: Price of a scale in the linear form, in (-log 2, 0).
        rho_0: Price of a scale in the quadratic form.

    Raises:
        ValueError: A number is out of range, or ``form`` is unknown.
    """

    extra_metrics = ("aps/scale",)

    def __init__(
        self,
        form: Literal["linear", "quadratic"] = "linear",
        t_min: PositiveFloat = 0.1,
        t_max: PositiveFloat = 5.0,
        rho: float = -0.2,
        rho_0: PositiveFloat = 0.1,
    ) -> None:
        if form not in ("linear", "quadratic"):
            raise ValueError(f"form must be linear or quadratic, got {form}")
        if not 0 < t_min <= t_max:
            raise ValueError(f"t_min must be positive and at most t_max, got t_min={t_min}, t_max={t_max}")
        if not (-math.log(2) < rho < 0 and rho_0 > 0):
            raise ValueError(f"rho must be in (-log 2, 0) and rho_0 positive, got rho={rho}, rho_0={rho_0}")
        self.form, self.t_min, self.t_max, self.rho, self.rho_0 = form, t_min, t_max, rho, rho_0

    @torch.no_grad()
    def scales(self, pair: PairLogps, beta: float) -> Tensor:
        """Return the ``(B,)`` scales t at which the losses are least.

        Args:
            pair: Log-probabilities of ``B`` pairs.
            beta: Factor of the margins.
        """
        margin = beta * log_ratio_margin(pair)
        # The derivative by t is the entropy of sigmoid(h/t), which grows from 0 to log 2, plus that of the price.
        highest = self.t_max if self.form == "linear" else max(self.t_min, math.log(2) / (2 * self.rho_0))
        low, high = torch.full_like(margin, self.t_min), torch.full_like(margin, highest)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            logit = margin / middle
            slope = -logsigmoid(logit) + logit * (-logit).sigmoid() + self._price_slope(middle)
            low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
        # The ends belong to the interval, and a bisection does not reach them.
        return torch.where(high == self.t_min, self.t_min, torch.where(low == highest, highest, (low + high) / 2))

    def _price(self, scale: Tensor) -> Tensor:
        return self.rho * scale if self.form == "linear" else self.rho_0 * scale**2 - scale * math.log(2)

    def _price_slope(self, scale: Tensor) -> Tensor | float:
        return self.rho if self.form == "linear" else 2 * self.rho_0 * scale - math.log(2)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        scale = self.scales(pair, beta)
        return -scale * logsigmoid(beta * log_ratio_margin(pair) / scale) + self._price(scale)

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of every loss, and the scales."""
        return super().metrics(pair, alpha=alpha, beta=beta) | {"aps/scale": self.scales(pair, beta)}
