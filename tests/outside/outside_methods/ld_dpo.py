"""Length-desensitized DPO: terms of the tokens that both completions of a pair have room for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses import PreferenceLoss, Term
from spo.types import PairLogps


class LDDPOLoss(PreferenceLoss):
    """LD-DPO, arXiv:2409.06411: tokens beyond the length of the shorter completion count less."""

    terms = {
        "policy": Term(lambda scored: scored.common_prefix(scored.policy_tokens)),
        "reference": Term(lambda scored: scored.common_prefix(scored.reference_tokens), needs_reference_logits=True),
    }

    def __init__(self, tail_weight: float) -> None:
        self.tail_weight = tail_weight

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        whole = torch.stack([pair.policy_chosen, pair.policy_rejected])
        whole = whole - torch.stack([pair.reference_chosen, pair.reference_rejected])
        prefix = pair.terms["policy"] - pair.terms["reference"]
        chosen, rejected = prefix + self.tail_weight * (whole - prefix)
        return -logsigmoid(beta * (chosen - rejected))
