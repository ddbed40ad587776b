"""Trust-region DPO: the reference follows the policy."""

from __future__ import annotations

import torch
from torch import nn

from spo.models import FrozenReference


class FollowingReference(FrozenReference):
    """TR-DPO, arXiv:2404.09656: every few steps, the reference moves by a share of the way to the policy."""

    moves = True

    def __init__(self, share: float, every: int) -> None:
        super().__init__()
        self.share, self.every = share, every

    def describe(self) -> str:
        return f"copy that moves by {self.share} of the way to the policy every {self.every} steps"

    @torch.no_grad()
    def after_step(self, policy: nn.Module, step: int) -> None:
        if step % self.every == 0:
            for own, new in zip(self.model.parameters(), policy.parameters(), strict=True):
                own.lerp_(new, self.share)
