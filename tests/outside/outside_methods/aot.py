"""Alignment via Optimal Transport: a loss of all pairs of a step, which compares their margins in sorted order."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses import PreferenceLoss
from spo.types import PairLogps


class AOTLoss(PreferenceLoss):
    """AOT for pairs, arXiv:2406.05882: the k-th largest margin of the policy against that of the reference."""

    full_batch = True

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        policy = pair.policy_chosen - pair.policy_rejected
        reference = pair.reference_chosen - pair.reference_rejected
        rank = policy.argsort().argsort()
        return -logsigmoid(beta * (policy - reference.sort().values[rank]))
