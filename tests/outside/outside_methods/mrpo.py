"""Multi-Reference Preference Optimization: a second reference beside the model that training starts from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses import PreferenceLoss
from spo.types import PairLogps


class MRPOLoss(PreferenceLoss):
    """MRPO, arXiv:2405.16388: DPO with the weighted harmonic mean of two references, the extra one clipped."""

    extra_references = ("extra",)

    def __init__(self, clip: float) -> None:
        self.clip = clip

    def reference(self, pair: PairLogps) -> Tensor:
        """Return the ``(2, B)`` log-probs of the combined reference."""
        base, extra = torch.stack([pair.reference_chosen, pair.reference_rejected]), pair.references["extra"]
        # A reference that tells the two completions apart more clearly has more weight.
        of_base, of_extra = (logps[0] - logps[1] for logps in (base, extra))
        share = of_extra.abs() / (of_extra.abs() + of_base.abs() + 1e-6)
        size = ((base + extra) / 2).abs()
        room = self.clip * size / size.sum(0) * base.abs()
        extra = extra.clamp(base - room, base + room)
        return -torch.logaddexp(share.log() - extra, (1 - share).log() - base)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        chosen, rejected = self.rewards(pair, alpha=alpha, beta=beta)
        return -logsigmoid(chosen - rejected)

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.reference(pair)
        return beta * (pair.policy_chosen - chosen), beta * (pair.policy_rejected - rejected)
