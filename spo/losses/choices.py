"""Choice probabilities of SPO on lists, which best-of-n and rankings share."""

from __future__ import annotations

import torch
from torch import Tensor

from spo.losses.base import ListLoss
from spo.types import ListLogps


class SPOListLoss(ListLoss):
    """Base class of SPO's losses on lists: no reference, rewards alpha log pi(y|x), and the optimum."""

    uses_reference: bool = False
    uses_alpha: bool = True
    uses_beta: bool = False

    def rewards(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        """Return alpha log pi(y|x), ``(B, n)``: the logits of SPO's choice probabilities."""
        return alpha * lists.policy

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor:
        """Return log softmax(r / alpha), for Plackett-Luce rankings with the rewards r (arXiv:2405.00747)."""
        return (rewards / alpha).log_softmax(-1)


def choice_losses(lists: ListLogps, alpha: float) -> Tensor:
    r"""Compute the negative log-probability, over alpha, that each completion is chosen among itself and later ones.

    .. math:: L_k = -\frac{1}{\alpha} \log \frac{\pi(y_k|x)^\alpha}{\sum_{j=k}^n \pi(y_j|x)^\alpha}

    Args:
        lists: ``B`` lists with the completions y_1, ..., y_n best first, missing ones last.
        alpha: Softness.

    Returns:
        ``(B, n)``; 0 for the last completion of a list and for missing ones.
    """
    # Written as logsumexp_j alpha (log pi(y_j) - log pi(y_k)): sums of hundreds of nats cancel before they are rounded.
    differences = lists.policy[:, None, :] - lists.policy[:, :, None]
    compared = lists.mask[:, None, :] & torch.ones_like(differences[0], dtype=torch.bool).triu(1)
    itself = torch.eye(differences.shape[-1], dtype=torch.bool, device=differences.device)
    losses = (alpha * differences).masked_fill(~(compared | itself), -torch.inf).logsumexp(-1) / alpha
    return losses.masked_fill(~lists.mask, 0)
