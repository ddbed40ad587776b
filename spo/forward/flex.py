"""Attention of packed rows by one FlexAttention kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from spo.forward.grouped import cached_on, in_one_dtype, membership
from spo.forward.packing import Group, Groups
from spo.types import copy_async

FLEX_BLOCK_TOKENS = 128
"""Tokens in a block of FlexAttention's masks."""
MAX_FLEX_KERNELS = 64
"""Kernels that FlexAttention may compile, one for each model, dtype, autocast and gradient mode, and kind of lengths.
Beyond this number it computes every product of the row, which is many times slower and needs far more memory."""


@torch.compiler.disable(recursive=False)
def attend_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Compute what :func:`spo.forward.grouped.attend_by_group` does in one kernel, which skips fully masked blocks.

    Raises:
        ValueError: ``dropout`` is not 0, which the kernel does not support.
    """
    if dropout > 0:
        raise ValueError("FlexAttention does not support dropout")
    mask = cached_on(groups, ("blocks", query.device), lambda: block_mask(groups, query.device))
    query, key, value = in_one_dtype(query, key, value)
    settings: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    if not query.is_cuda:
        return flex_attention(query, key, value, **settings)
    with torch._dynamo.config.patch(recompile_limit=MAX_FLEX_KERNELS):
        return _compiled_flex_attention()(query, key, value, **settings)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def block_mask(groups: Groups, device: torch.device) -> BlockMask:
    """Return the mask of FlexAttention for a packed row.

    The blocks follow from the lengths alone: reading them off a mask of all pairs of tokens would be quadratic. In full
    blocks, which are those of long prompts and completions, the kernel does not compute the mask.

    Args:
        groups: Layout of the row.
        device: Device of the mask.
    """
    group, member = membership(groups.members)
    partial, full = _blocks(groups.members)
    group_of, member_of = copy_async(group, device), copy_async(member, device)

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        member = member_of[k]
        return (q >= k) & (group_of[q] == group_of[k]) & ((member == 0) | (member == member_of[q]))

    count, index, full_count, full_index = (
        copy_async(numbers, device) for blocks in (partial, full) for numbers in _ordered(blocks)
    )
    return BlockMask.from_kv_blocks(
        count,
        index,
        full_count,
        full_index,
        BLOCK_SIZE=FLEX_BLOCK_TOKENS,
        mask_mod=visible,
        seq_lengths=(len(group), len(group)),
    )


def _blocks(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Return two matrices of blocks of queries and keys: which are visible in part, and which in full.

    An incomplete block at the end of the row is never full, since the kernel has to mask what is missing.
    """
    segments, start = [], 0
    for group in groups:
        prompt, end = (start, start + group.prompt), start + group.length
        for number, length in enumerate((group.prompt, *group.completions)):
            # The prompt and its first completion are neighbors, and an ordinary causal sequence.
            segments.append((prompt[0] if number == 1 else start, start + length, *prompt, end))
            start += length
    bounds = torch.tensor(segments)
    first = torch.arange(0, start, FLEX_BLOCK_TOKENS)  # First query of each block, and first key.
    of_first = bounds[torch.searchsorted(bounds[:, 1].contiguous(), first, right=True)]
    own_start, own_end, prompt_start, prompt_end, group_end = of_first.T[:, :, None]
    query, key, size = first[:, None], first[None], FLEX_BLOCK_TOKENS

    def touches(start: Tensor, end: Tensor) -> Tensor:
        return (start < key + size) & (key < end)

    def fills(start: Tensor, end: Tensor) -> Tensor:
        return (start <= key) & (key + size <= end)

    # Later sequences of a block of queries begin in that block, so earlier blocks are seen by the first one alone.
    earlier = key < query
    seen = (key == query) | (earlier & (touches(own_start, own_end) | touches(prompt_start, prompt_end)))
    own = fills(own_start, own_end) & (query + size <= own_end)
    shared = fills(prompt_start, prompt_end) & (query + size <= group_end)
    full = earlier & (own | shared)
    return seen & ~full, full


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen blocks in each row of a matrix, and the blocks with the chosen ones first."""
    index = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], index.int()[None, None]
