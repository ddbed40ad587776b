"""Efficient Exact Optimization, on completions with rewards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spo.bounds import PositiveFloat
from spo.losses.base import ListLoss
from spo.losses.declarations import Feature
from spo.types import ListLogps


class EXORewardLoss(ListLoss):
    r"""EXO on n completions with rewards (EXO-rw), arXiv:2402.00856.

    .. math:: L = \sum_i q_i (\log q_i - \log p_i), \quad
              q = \mathrm{softmax}_i\left(\beta \log\frac{\pi(y_i|x)}{\pi_{ref}(y_i|x)}\right), \quad
              p = \mathrm{softmax}_i(r_i / \beta_r)

    where log-probabilities are *summed*, ``(B, n)``, and the rewards r are read from the data: the column ``rewards``
    of a ranked list, or ``chosen_reward`` and ``rejected_reward`` of a pair. The order of the list does not matter. The
    official script divides the logits of both models by 0.8 before; here they are as the models give them.

    Args:
        reward_temperature: Temperature beta_r of the rewards.

    Raises:
        ValueError: ``reward_temperature`` is not positive.
    """

    features: Mapping[str, Feature] = {"reward": Feature("reward", each=True)}

    def __init__(self, reward_temperature: PositiveFloat = 0.5) -> None:
        if not reward_temperature > 0:
            raise ValueError(f"reward_temperature must be positive, got {reward_temperature}")
        self.reward_temperature = reward_temperature

    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each list."""
        if lists.reference is None:
            raise ValueError("EXO needs the reference")
        target = _log_softmax(lists.features["reward"].to(lists.policy) / self.reward_temperature, lists.mask)
        choice = _log_softmax(beta * (lists.policy - lists.reference), lists.mask)
        return (choice.exp() * (choice - target).masked_fill(~lists.mask, 0)).sum(-1)

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor:
        """Return log pi_ref + r / (beta beta_r), normalized: there q equals p for every list, and the loss is 0."""
        return (reference_logps + rewards / (beta * self.reward_temperature)).log_softmax(-1)


def _log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Return ``(B, n)`` log-softmax over the completions that exist."""
    return logits.masked_fill(~mask, -torch.inf).log_softmax(-1)
