"""Binary Classifier Optimization: the mean log-ratio so far is a buffer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from spo.losses import PreferenceLoss
from spo.types import PairLogps


class BCOLoss(PreferenceLoss, nn.Module):
    """BCO, arXiv:2404.04656, for pairs; the shift of the rewards is their mean over all completions so far."""

    extra_metrics = ("bco/shift",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update_statistics(self, logps: PairLogps) -> None:
        ratios = torch.cat(self.log_ratios(logps))
        self.total += ratios.sum()
        self.count += len(ratios)

    def log_ratios(self, pair: PairLogps) -> tuple[Tensor, Tensor]:
        return pair.policy_chosen - pair.reference_chosen, pair.policy_rejected - pair.reference_rejected

    def shift(self, pair: PairLogps) -> Tensor:
        return (self.total / self.count.clamp(min=1)).to(pair.policy_chosen)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        chosen, rejected = self.log_ratios(pair)
        shift = self.shift(pair)
        return -logsigmoid(beta * (chosen - shift)) - logsigmoid(-beta * (rejected - shift))

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        shift = beta * self.shift(pair).expand(len(pair))
        return super().metrics(pair, alpha=alpha, beta=beta) | {"bco/shift": shift}
