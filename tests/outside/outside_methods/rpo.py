"""Relative Preference Optimization: a loss of all pairs of a step, weighted by the likeness of their prompts."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from spo.losses import Feature, PreferenceLoss
from spo.types import PairLogps


class RPOLoss(PreferenceLoss):
    """RPO, arXiv:2402.10958: each chosen completion against the rejected ones of all prompts."""

    full_batch = True

    def __init__(self, column: str, size: int, temperature: float) -> None:
        self.features = {"embedding": Feature(column, size=size)}
        self.temperature = temperature

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        embedding = normalize(pair.features["embedding"].to(pair.policy_chosen), dim=-1)
        weight = ((embedding @ embedding.T - 1) / self.temperature).softmax(-1)
        chosen = pair.policy_chosen - pair.reference_chosen
        rejected = pair.policy_rejected - pair.reference_rejected
        return -logsigmoid(beta * weight * (chosen[:, None] - rejected)).mean(-1)
