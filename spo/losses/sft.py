"""Supervised fine-tuning, as a method like any other."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from spo.losses.base import PreferenceLoss, weighted
from spo.types import PairLogps


class SFTLoss(PreferenceLoss):
    """Negative log-likelihood of the chosen completion: ``-log pi(y_w|x)``, ``(B,)``.

    Args:
        length_normalize: true divides by the completion's tokens, which weighs short and long completions alike.
    """

    uses_reference: ClassVar[bool] = False
    uses_rejected: ClassVar[bool] = False
    uses_beta: ClassVar[bool] = False

    def __init__(self, length_normalize: bool = False) -> None:
        self.length_normalize = length_normalize

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        losses = -pair.policy_chosen
        if self.length_normalize:
            if pair.chosen_length is None:
                raise ValueError("SFT with length_normalize=true needs chosen_length")
            losses = losses / pair.chosen_length
        return weighted(losses, pair)

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Log pi(y|x), the only quantity SFT moves."""
        return pair.policy_chosen, pair.policy_rejected
