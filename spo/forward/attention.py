"""Registration of the attention of packed rows with transformers.

transformers calls an attention function by name. The functions registered here read the layout of the row from a
keyword of the model's forward, ``packed_groups``, and attend within the groups. Without the keyword they call the
model's original attention, so generation and padded batches run as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spo.forward.flex import attend_by_blocks
from spo.forward.grouped import attend_by_group, attend_in_launches
from spo.forward.head import NO_MASK_SHAPE
from spo.forward.packing import Groups

IGNORABLE_KWARGS = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "use_cache",
}
"""Keywords that architectures pass to attention and that do not change what it computes."""

BACK_ENDS: dict[str, Callable[..., Tensor]] = {
    "flex": attend_by_blocks,
    "launches": attend_in_launches,
    "groups": attend_by_group,
}


def back_ends(device: torch.device) -> list[str]:
    """Return the names of the back ends to try on a device, the fastest first."""
    return ["flex", "launches"] if device.type == "cuda" else ["groups"]


# --- as transformers calls it -------------------------------------------------------------------------------------

_registered: set[str] = set()
_recorded: list[nn.Module] | None = None


def is_registered(name: str) -> bool:
    """Return whether an attention implementation of transformers is one of those registered here."""
    return name in _registered


@contextmanager
def record_attention_modules() -> Iterator[list[nn.Module]]:
    """Yield a list to which each attention module is appended when it runs on a packed row."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def register_packed_attention(back_end: str, original: str) -> str:
    """Register an attention implementation with transformers.

    Args:
        back_end: Name in :data:`BACK_ENDS` of the attention for packed rows.
        original: Name of the implementation to call where the input is not packed.

    Returns:
        The name of the registered implementation.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        packed_groups: Groups | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if packed_groups is None:
            call = _original_attention(original, module)
            return call(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        # Both errors reach the probe, which reports them and leaves the model unpacked.
        if unsupported := sorted(name for name in kwargs.keys() - IGNORABLE_KWARGS if kwargs[name] is not None):
            raise ValueError(f"its attention takes {' and '.join(unsupported)}")
        if attention_mask is None or attention_mask.shape != NO_MASK_SHAPE or attention_mask.dtype != torch.bool:
            raise ValueError("it makes its own attention mask")
        if _recorded is not None:
            _recorded.append(module)
        attended = BACK_ENDS[back_end](query, key, value, packed_groups, scaling, dropout)
        return attended.transpose(1, 2).contiguous(), None

    name = f"packed_{back_end}_{original}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    _registered.add(name)
    return name


def _original_attention(name: str, module: nn.Module) -> Callable[..., Any]:
    if name == "eager":  # Each architecture defines its own eager attention, in the file of its modules.
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
