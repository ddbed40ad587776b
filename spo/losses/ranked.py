"""Soft Preference Optimization on lists: the best of n completions, and full rankings."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spo.losses.base import ListLoss
from spo.types import ListLogps


class _SPOOnLists(ListLoss):
    uses_reference: ClassVar[bool] = False
    uses_alpha: ClassVar[bool] = True
    uses_beta: ClassVar[bool] = False

    def rewards(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        """Alpha log pi(y|x), ``(B, n)``: the logits of SPO's choice probabilities."""
        return alpha * lists.policy

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor:
        """Softmax(r / alpha), for rankings of Plackett and Luce with the rewards r (arXiv:2405.00747)."""
        return (rewards / alpha).log_softmax(-1)


class SPOBestOfNLoss(_SPOOnLists):
    r"""SPO for a prompt's best completion y* among n, arXiv:2405.00747.

    .. math:: L = -\frac{1}{\alpha} \log \frac{\pi(y^*|x)^\alpha}{\sum_{i=1}^n \pi(y_i|x)^\alpha}

    with *summed* log-probabilities, ``(B, n)``. How the others compare with each other is not read. For n = 2 it is
    the loss of pairs.
    """

    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        return choice_losses(lists, alpha)[:, 0]


class SPORankedLoss(_SPOOnLists):
    r"""SPO for a full ranking y_1 (best), ..., y_n (worst), in the model of Plackett and Luce, arXiv:2405.00747.

    .. math:: L = -\frac{1}{\alpha} \sum_{k=1}^{n-1} \log \frac{\pi(y_k|x)^\alpha}{\sum_{j=k}^n \pi(y_j|x)^\alpha}

    with *summed* log-probabilities, ``(B, n)``. For n = 2 it is the loss of pairs.
    """

    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        return choice_losses(lists, alpha).sum(-1)


def choice_losses(lists: ListLogps, alpha: float) -> Tensor:
    r"""Entry k: ``-(1/alpha) log`` of the probability that y_k is chosen among itself and the later completions.

    Args:
        lists: with the completions best first, missing ones last.
        alpha: softness.

    Returns:
        ``(B, n)``; 0 for the last completion of a list and the missing ones.
    """
    # As logsumexp_j alpha (lp_j - lp_k), j from k on: sums of hundreds of nats cancel before they are rounded.
    differences = lists.policy[:, None, :] - lists.policy[:, :, None]
    compared = lists.mask[:, None, :] & torch.ones_like(differences[0], dtype=torch.bool).triu(1)
    itself = torch.eye(differences.shape[-1], dtype=torch.bool, device=differences.device)
    losses = (alpha * differences).masked_fill(~(compared | itself), -torch.inf).logsumexp(-1) / alpha
    return losses.masked_fill(~lists.mask, 0)
