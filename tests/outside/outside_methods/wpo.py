"""Weighted DPO: a term of the policy's logits that is constant in the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from spo.losses import DPOLoss, Term
from spo.objective import ScoredBatch
from spo.ops import at_least_float32, by_rows
from spo.types import PairLogps


@torch.no_grad()
def likeness(scored: ScoredBatch) -> Tensor:
    """Return how likely each token is next to what the policy itself would say, as a geometric mean over tokens."""

    def log_sum_of_squares(logits: Tensor) -> Tensor:
        return (2 * at_least_float32(logits).log_softmax(-1)).logsumexp(-1)

    return scored.mean_per_completion(scored.policy_tokens - by_rows(log_sum_of_squares, scored.policy)).exp()


class WPOLoss(DPOLoss):
    """WPO, arXiv:2406.11827, eq. 2."""

    terms = {"weight": Term(likeness)}

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return pair.terms["weight"].prod(0) * super().of_pairs(pair, alpha=alpha, beta=beta)
