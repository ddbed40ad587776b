"""Layers of losses that read hidden states of the policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StateHead(nn.Linear):
    """A linear layer that computes in its own precision, at least float32, whatever that of the states."""

    def forward(self, states: Tensor) -> Tensor:
        """Return ``(..., out_features)`` numbers of ``(..., H)`` hidden states."""
        with torch.autocast(states.device.type, enabled=False):
            return super().forward(states.to(self.weight.dtype))
