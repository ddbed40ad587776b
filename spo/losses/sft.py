"""Supervised fine-tuning, as a method like any other."""

from __future__ import annotations

from torch import Tensor

from spo.losses.base import PreferenceLoss
from spo.types import PairLogps


class SFTLoss(PreferenceLoss):
    r"""Negative log-likelihood of the chosen completion.

    .. math:: L = -\log\pi(y_w|x)

    where y_w is the chosen completion and log pi(y|x) the *summed* log-probability, ``(B,)``.

    Args:
        length_normalize: Divide by the tokens of the completion, so that short and long completions weigh the same.
    """

    uses_reference: bool = False
    uses_rejected: bool = False
    uses_beta: bool = False

    def __init__(self, length_normalize: bool = False) -> None:
        self.length_normalize = length_normalize

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        losses = -pair.policy_chosen
        if self.length_normalize:
            if pair.chosen_length is None:
                raise ValueError("SFT with length_normalize=true needs chosen_length")
            losses = losses / pair.chosen_length
        return losses

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return log pi(y|x), the only quantity that SFT changes."""
        return pair.policy_chosen, pair.policy_rejected
