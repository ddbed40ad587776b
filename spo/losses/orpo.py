"""Odds Ratio Preference Optimization."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_policy_logps, chosen_nll, per_token
from spo.types import PairLogps

TokenMean = Literal["completion", "batch"]


class ORPOLoss(PreferenceLoss):
    r"""ORPO, arXiv:2403.07691, eq. 6 and 7; ``beta`` is the paper's lambda.

    .. math:: L = -\frac{\log\pi(y_w|x)}{|y_w|}
                  - \lambda \log\sigma\left(\log\frac{p_w}{1 - p_w} - \log\frac{p_l}{1 - p_l}\right), \quad
              p = \pi(y|x)^{1/|y|}

    where log-probabilities are summed over the tokens of a completion, ``(B,)``. A completion with probability 1 has
    infinite odds.

    Args:
        nll_mean: Mean of the likelihood: over the tokens of each ``completion``, or of the whole ``batch`` (TRL).

    Raises:
        ValueError: ``nll_mean`` is unknown.
    """

    uses_reference = False

    def __init__(self, nll_mean: TokenMean = "completion") -> None:
        if nll_mean not in get_args(TokenMean):
            raise ValueError(f"nll_mean must be completion or batch, got {nll_mean}")
        self.nll_mean = nll_mean
        self.full_batch = nll_mean == "batch"

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = per_token(pair, both_policy_logps(pair))
        return chosen_nll(pair, self.nll_mean) - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return lambda times the mean log-probability of a token, as TRL does."""
        chosen, rejected = per_token(pair, both_policy_logps(pair))
        return beta * chosen, beta * rejected


def _log_odds(logp: Tensor) -> Tensor:
    """Return log p - log(1 - p) from log p, precise at both ends."""
    is_likely = logp > -math.log(2)
    # Each branch gets numbers of its own range, so that the other one does not put NaN into the gradient.
    near_one = torch.where(is_likely, logp, -1.0)
    near_zero = torch.where(is_likely, -1.0, logp)
    return logp - torch.where(is_likely, (-near_one.expm1()).log(), (-near_zero.exp()).log1p())
