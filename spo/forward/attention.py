"""Attention of packed rows, and its registration with transformers.

transformers calls an attention function by name. The functions registered here read the layout of the row from a
keyword of the model's forward, ``packed_groups``, and attend within the groups. Without the keyword they call the
model's original attention, so generation and padded batches run as before.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spo.batching import split_by_tokens
from spo.forward.head import NO_MASK_SHAPE
from spo.forward.packing import Group, Groups
from spo.types import copy_async

MAX_MASKED_TOKENS = 256
"""Tokens that attend in one masked call. Most pairs of them are masked out, but shorter calls cost more than that."""
FLEX_BLOCK_TOKENS = 128
"""Tokens in a block of FlexAttention's masks."""
MAX_FLEX_KERNELS = 64
"""Kernels that FlexAttention may compile, one for each model, dtype, autocast and gradient mode, and kind of lengths.
Beyond this number it computes every product of the row, which is many times slower and needs far more memory."""
IGNORABLE_KWARGS = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "use_cache",
}
"""Keywords that architectures pass to attention and that do not change what it computes."""
T = TypeVar("T")


# --- one call of the kernel for each group ------------------------------------------------------------------------


@torch.compiler.disable  # The calls differ from row to row, so each row would be compiled anew.
def attend_by_group(
    query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Apply causal attention in which each completion of a packed row attends to its prompt and itself.

    Args:
        query: ``(1, heads, L, d)``.
        key: ``(1, heads, L, d)``.
        value: ``(1, heads, L, d)``.
        groups: Layout of the row.
        scale: Factor of the products; ``None`` for ``1 / sqrt(d)``.
        dropout: Dropout probability of the attention weights.

    Returns:
        ``(1, heads, L, d)``.
    """
    calls = _cached_on(groups, ("calls", query.device), lambda: list(kernel_calls(groups, query.device)))
    # `split` and not slices: the gradient of a slice is a tensor of zeros as long as the whole row.
    queries, keys, values = (tensor.split([call.length for call in calls], dim=2) for tensor in (query, key, value))

    def attended(parts: Sequence[Tensor], call: KernelCall) -> Tensor:
        chosen = [parts[i] for i in call.attends_to]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)

    return torch.cat(
        [
            scaled_dot_product_attention(
                q,
                attended(keys, call),
                attended(values, call),
                attn_mask=call.mask,
                is_causal=call.mask is None,
                scale=scale,
                dropout_p=dropout,
            )
            for q, call in zip(queries, calls, strict=True)
        ],
        dim=2,
    )


class KernelCall(NamedTuple):
    """A call of the attention kernel for consecutive tokens of a packed row.

    Attributes:
        length: Number of the tokens.
        attends_to: Indices of the calls whose tokens they attend to.
        mask: ``(length, attended)`` true where a query sees a key; ``None`` for causal attention.
    """

    length: int
    attends_to: tuple[int, ...]
    mask: Tensor | None


def kernel_calls(groups: Groups, device: torch.device) -> Iterator[KernelCall]:
    """Yield the calls of the attention kernel for a packed row, in the order of the row.

    Several small groups share one masked call. Of a large group, the prompt is a causal call of its own, and small
    completions share masked calls.

    Args:
        groups: Layout of the row.
        device: Device of the masks.
    """
    made = 0
    for run in _runs(groups.members, lambda group: group.length):
        [group, *others] = run
        length = sum(group.length for group in run)
        if not others and len(group.completions) == 1:
            # A prompt with one completion is an ordinary causal sequence, for which kernels are fastest.
            calls = [KernelCall(length, (made,), None)]
        elif length <= MAX_MASKED_TOKENS:
            calls = [KernelCall(length, (made,), visibility_mask(run, device))]
        else:
            calls = [KernelCall(group.prompt, (made,), None)]
            for lengths in _runs(group.completions, int):
                mask = visibility_mask([Group(group.prompt, tuple(lengths))], device)[group.prompt :]
                calls.append(KernelCall(sum(lengths), (made, made + len(calls)), mask))
        made += len(calls)
        yield from calls


def _runs(items: Sequence[T], length: Callable[[T], int]) -> Iterator[Sequence[T]]:
    """Yield consecutive items in runs of at most ``MAX_MASKED_TOKENS`` tokens; a longer item is a run of its own."""
    runs = split_by_tokens([(1, length(item)) for item in items], max_tokens=MAX_MASKED_TOKENS)
    return (items[run] for run in runs)


@torch.compiler.disable
def _cached_on(groups: Groups, name: object, make: Callable[[], Any]) -> Any:
    """Return what ``make`` derives from the groups, made once for all layers and models that see the row."""
    if name not in groups.derived:
        groups.derived[name] = make()
    return groups.derived[name]


def _membership(groups: Iterable[Group]) -> tuple[Tensor, Tensor]:
    """Return the index of each token's group, and within it 0 for the prompt or the number of the completion."""
    lengths = [(group.prompt, *group.completions) for group in groups]
    group = torch.cat([torch.full((sum(parts),), i) for i, parts in enumerate(lengths)])
    member = torch.cat([torch.full((n,), i) for parts in lengths for i, n in enumerate(parts)])
    return group, member


def visibility_mask(groups: Sequence[Group], device: torch.device) -> Tensor:
    """Return ``(L, L)``, true where the token of a row attends to the token of a column."""
    group, member = _membership(groups)
    position = torch.arange(len(group))
    in_prompt_or_itself = (member == 0) | (member == member[:, None])
    visible = in_prompt_or_itself & (group == group[:, None]) & (position <= position[:, None])
    return copy_async(visible, device)


# --- one FlexAttention kernel for the whole row -------------------------------------------------------------------


@torch.compiler.disable(recursive=False)
def attend_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Compute what :func:`attend_by_group` does in one FlexAttention kernel, which skips fully masked blocks.

    Raises:
        ValueError: ``dropout`` is not 0, which the kernel does not support.
    """
    if dropout > 0:
        raise ValueError("FlexAttention does not support dropout")
    mask = _cached_on(groups, ("blocks", query.device), lambda: block_mask(groups, query.device))
    if torch.is_autocast_enabled(query.device.type):  # As in other attention: autocast does not know FlexAttention.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if not query.is_cuda:
        return flex_attention(query, key, value, block_mask=mask, scale=scale)
    with torch._dynamo.config.patch(recompile_limit=MAX_FLEX_KERNELS):
        return _compiled_flex_attention()(query, key, value, block_mask=mask, scale=scale)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def block_mask(groups: Groups, device: torch.device) -> BlockMask:
    """Return the mask of FlexAttention for a packed row.

    The blocks follow from the lengths alone: reading them off a mask of all pairs of tokens would be quadratic.

    Args:
        groups: Layout of the row.
        device: Device of the mask.
    """
    group_of, member_of = (copy_async(numbers, device) for numbers in _membership(groups.members))

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        member = member_of[k]
        return (q >= k) & (group_of[q] == group_of[k]) & ((member == 0) | (member == member_of[q]))

    ends = list(accumulate(group.length for group in groups.members))
    starts = [0, *ends[:-1]]
    queries = range(0, ends[-1], FLEX_BLOCK_TOKENS)
    # A block of queries attends to the blocks from the start of its first query's group up to itself.
    first = [starts[bisect_right(ends, query)] // FLEX_BLOCK_TOKENS for query in queries]
    count = torch.tensor([block + 1 - start for block, start in enumerate(first)], dtype=torch.int32)
    offsets = torch.arange(len(queries), dtype=torch.int32)
    index = (torch.tensor(first, dtype=torch.int32)[:, None] + offsets).clamp(max=len(queries) - 1)
    return BlockMask.from_kv_blocks(
        copy_async(count, device)[None, None],
        copy_async(index, device)[None, None],
        BLOCK_SIZE=FLEX_BLOCK_TOKENS,
        mask_mod=visible,
        seq_lengths=(ends[-1], ends[-1]),
    )


BACK_ENDS: dict[str, Callable[..., Tensor]] = {"flex": attend_by_blocks, "groups": attend_by_group}


def back_ends(device: torch.device) -> list[str]:
    """Return the names of the back ends to try on a device, the fastest first."""
    return ["flex", "groups"] if device.type == "cuda" else ["groups"]


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
        queries_per_key = query.shape[1] // key.shape[1]
        if queries_per_key > 1:  # Grouped-query attention: the back ends take as many keys as queries.
            key, value = (tensor.repeat_interleave(queries_per_key, dim=1) for tensor in (key, value))
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
