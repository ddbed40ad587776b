"""Self-Play Preference Optimization of Wu et al., for hard labels and for estimated win rates."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spo.losses.base import PreferenceLoss
from spo.losses.declarations import Feature
from spo.losses.margins import both_log_ratios
from spo.types import PairLogps


class SPPOLoss(PreferenceLoss):
    r"""SPPO, arXiv:2405.00675, one round of self-play; ``beta`` is 1/eta.

    .. math:: L = \frac{1}{2} \sum_{y \in \{y_w, y_l\}}
                  \left(\log\frac{\pi(y|x)}{\pi_{ref}(y|x)} - \eta \left(P(y) - \frac{1}{2}\right)\right)^2

    where the reference is the policy at the start of the round, P(y) is the mean probability that y wins against its
    samples, y itself included with 1/2, and log-probabilities are *summed*, ``(B,)``. With ``win_rates`` P is read from
    the columns ``chosen_win_rate`` and ``rejected_win_rate``; else it is 1 for y_w and 0 for y_l.

    Args:
        win_rates: Read estimated win rates from the data. The loss of a pair then does not depend on its label.
        reduction: ``mean`` of the two squares (official code), or their ``sum`` (TRL).

    Raises:
        ValueError: ``reduction`` is unknown.
    """

    def __init__(self, win_rates: bool = False, reduction: Literal["mean", "sum"] = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be mean or sum, got {reduction}")
        self.reduction = reduction
        self.features = {"win_rate": Feature("win_rate", each=True)} if win_rates else {}

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        ratios = torch.stack(both_log_ratios(pair), -1)
        win_rates = pair.features["win_rate"].to(ratios) if self.features else ratios.new_tensor([1.0, 0.0])
        squares = (ratios - (win_rates - 0.5) / beta) ** 2
        return squares.mean(-1) if self.reduction == "mean" else squares.sum(-1)
