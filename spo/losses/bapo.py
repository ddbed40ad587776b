"""Base-Anchored Preference Optimization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import NonNegativeFloat
from spo.losses.base import PreferenceLoss
from spo.losses.declarations import Drawn, Role
from spo.losses.margins import log_ratio_margin
from spo.types import PairLogps


class BAPOLoss(PreferenceLoss):
    r"""BAPO, arXiv:2407.00693: DPO, and an anchor at the reference's own response.

    .. math:: L = -\log\sigma(\beta h) + \lambda A(u_b), \quad u_b = \log\frac{\pi(y_b|x)}{\pi_{ref}(y_b|x)}, \quad
              A(u) = u^2 \text{ or } \max(0, -u)

    where h is the margin of DPO, ``(B,)``, and y_b is a response that the reference has written to the prompt: one is
    drawn for each prompt once, and cached. The shape of the anchor is a reconstruction: the abstract describes it in
    words, and its equation was not read. A sum over tokens with the square outweighs DPO on long responses, so u_b is
    per token by default.

    Args:
        anchor_weight: Weight lambda of the anchor; 0 is DPO.
        form: ``squared`` for u^2, ``hinge`` for max(0, -u).
        per_token: Divide u_b by the tokens of y_b.

    Raises:
        ValueError: ``anchor_weight`` is negative or ``form`` is unknown.
    """

    extra_completions: Mapping[str, Role] = {"anchor": Drawn(gradient=True)}
    extra_metrics = ("bapo/anchor",)

    def __init__(
        self,
        anchor_weight: NonNegativeFloat = 0.1,
        form: Literal["squared", "hinge"] = "squared",
        per_token: bool = True,
    ) -> None:
        if not anchor_weight >= 0:
            raise ValueError(f"anchor_weight must be >= 0, got {anchor_weight}")
        if form not in ("squared", "hinge"):
            raise ValueError(f"form must be squared or hinge, got {form}")
        self.anchor_weight, self.form, self.per_token = anchor_weight, form, per_token

    def anchors(self, pair: PairLogps) -> Tensor:
        """Return the ``(B,)`` distance A of each pair's anchor.

        Raises:
            ValueError: The reference log-prob of the anchor is missing.
        """
        anchor = pair.extra["anchor"]
        if anchor.reference is None:
            raise ValueError("BAPO needs the reference log-probs of its anchor")
        ratio = anchor.policy - anchor.reference
        if self.per_token:
            ratio = ratio / anchor.length
        return ratio**2 if self.form == "squared" else (-ratio).relu()

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        return -logsigmoid(beta * log_ratio_margin(pair)) + self.anchor_weight * self.anchors(pair)

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of every loss, and the distance of the anchors."""
        return super().metrics(pair, alpha=alpha, beta=beta) | {"bapo/anchor": self.anchors(pair)}
