"""Attention of packed rows by the ordinary kernels, for the groups of a row apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention

from spo.batching import split_by_tokens
from spo.forward.packing import Group, Groups
from spo.types import copy_async

MAX_MASKED_TOKENS = 256
"""Tokens that attend in one masked call. Most pairs of them are masked out, but shorter calls cost more than that."""
SHORTEST_LAUNCH_TOKENS = 64
"""Tokens to which the calls of an accelerator are padded at least, so that calls of similar length share a launch."""
T = TypeVar("T")


# --- one call of the kernel after the other -----------------------------------------------------------------------


@torch.compiler.disable  # The calls differ from row to row, so each row would be compiled anew.
def attend_by_group(
    query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Apply causal attention in which each completion of a packed row attends to its prompt and itself.

    Args:
        query: ``(1, heads, L, d)``.
        key: ``(1, key_heads, L, d)``. Each of its heads serves ``heads / key_heads`` neighboring heads of the query.
        value: ``(1, key_heads, L, d)``.
        groups: Layout of the row.
        scale: Factor of the products; ``None`` for ``1 / sqrt(d)``.
        dropout: Dropout probability of the attention weights.

    Returns:
        ``(1, heads, L, d)``.
    """
    calls = cached_on(groups, ("calls", query.device), lambda: list(kernel_calls(groups, query.device)))
    # `split` and not slices: the gradient of a slice is a tensor of zeros as long as the whole row.
    queries, keys, values = (
        tensor.split([call.length for call in calls], dim=2) for tensor in in_one_dtype(query, key, value)
    )

    def attended(parts: Sequence[Tensor], call: KernelCall) -> Tensor:
        chosen = [parts[i] for i in call.attends_to]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)

    return torch.cat(
        [
            _attend(q, attended(keys, call), attended(values, call), call.mask, scale, dropout)
            for q, call in zip(queries, calls, strict=True)
        ],
        dim=2,
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    """Run the kernel; without a mask, attention is causal."""
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and not _takes_grouped_heads(query, key, value, mask, dropout):
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
        is_grouped = False
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=is_grouped,
    )


def _takes_grouped_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Return whether a fused kernel takes fewer heads of keys than of queries.

    On a GPU this is the flash kernel alone. Any other would leave the call to an unfused one, which needs far more
    memory than a copy of the keys.
    """
    if not query.is_cuda:
        return True
    return can_use_flash_attention(SDPAParams(query, key, value, mask, dropout, mask is None, True))


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


# --- calls of similar shape together ------------------------------------------------------------------------------


@torch.compiler.disable
def attend_in_launches(
    query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Compute what :func:`attend_by_group` does in few launches, which cost an accelerator more than padding does."""
    plan = cached_on(groups, ("plan", query.device), lambda: plan_launches(groups, query.device))
    query, key, value = in_one_dtype(query, key, value)
    # One gather each for all launches: the gradient of a slice is a tensor of zeros as long as the whole row.
    queries = query.index_select(2, plan.queries).split([one.calls * one.queries for one in plan.launches], dim=2)
    keys, values = (
        tensor.index_select(2, plan.keys).split([one.calls * one.keys for one in plan.launches], dim=2)
        for tensor in (key, value)
    )
    attended = []
    for launch, *parts in zip(plan.launches, queries, keys, values, strict=True):
        q, k, v = (part[0].unflatten(1, (launch.calls, -1)).transpose(0, 1) for part in parts)
        attended.append(_attend(q, k, v, launch.mask, scale, dropout).transpose(0, 1).flatten(1, 2))
    return torch.cat(attended, dim=1)[None].index_select(2, plan.places)


class Launch(NamedTuple):
    """Kernel calls of one shape, which are one launch.

    Attributes:
        calls: Number of the calls.
        queries: Queries of each call, with padding.
        keys: Keys of each call, with padding.
        mask: ``(calls, 1, queries, keys)`` true where a query sees a key; ``None`` for causal attention.
    """

    calls: int
    queries: int
    keys: int
    mask: Tensor | None


class Plan(NamedTuple):
    """The launches that compute the attention of a packed row.

    Attributes:
        launches: Launches in the order of the gathered tokens.
        queries: Position in the row of each query of the launches, call after call.
        keys: Position in the row of each key of the launches.
        places: Place of each token of the row among the queries.
    """

    launches: list[Launch]
    queries: Tensor
    keys: Tensor
    places: Tensor


def plan_launches(groups: Groups, device: torch.device) -> Plan:
    """Return how to compute the calls of :func:`kernel_calls` in few launches: calls of one shape share a launch.

    Args:
        groups: Layout of the row.
        device: Device of the attention.
    """
    calls = list(kernel_calls(groups, torch.device("cpu")))
    positions = torch.arange(sum(call.length for call in calls)).split([call.length for call in calls])
    by_shape: dict[tuple[int, int, bool], list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    for own, call in zip(positions, calls, strict=True):
        seen = torch.cat([positions[i] for i in call.attends_to])
        shape = _padded_length(len(own)), _padded_length(len(seen)), call.mask is None
        by_shape.setdefault(shape, []).append((own, seen, call.mask))
    launches, queries, keys, places, filled = [], [], [], torch.empty(len(torch.cat(positions)), dtype=torch.long), 0
    for (num_queries, num_keys, is_causal), members in by_shape.items():
        masks = []
        for own, seen, mask in members:
            places[own] = torch.arange(filled, filled + len(own))
            filled += num_queries
            # Padding repeats the last token of the call, so that no other sequence reaches the call.
            queries.append(torch.cat([own, own[-1:].expand(num_queries - len(own))]))
            keys.append(torch.cat([seen, seen[-1:].expand(num_keys - len(seen))]))
            if mask is not None:
                mask = torch.cat([mask, mask[-1:].expand(num_queries - len(own), -1)])
                masks.append(nn.functional.pad(mask, (0, num_keys - len(seen))))
        # In a causal call, padding is after every token that counts, which masks it.
        mask = None if is_causal else copy_async(torch.stack(masks)[:, None], device)
        launches.append(Launch(len(members), num_queries, num_keys, mask))
    gathered = (torch.cat(queries), torch.cat(keys), places)
    return Plan(launches, *(copy_async(index, device) for index in gathered))


def _padded_length(length: int) -> int:
    """Return the length to which a call is padded, at most half longer, so that few shapes are left."""
    step = max(SHORTEST_LAUNCH_TOKENS, 1 << max((length - 1).bit_length() - 2, 0))
    return -(-length // step) * step


# --- of every back end --------------------------------------------------------------------------------------------


def in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype of autocast, or else in that of the values.

    Under autocast, rotary embeddings leave queries and keys in float32 beside values in half precision.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    return tuple(tensor.to(dtype) for tensor in (query, key, value))


@torch.compiler.disable
def cached_on(groups: Groups, name: object, make: Callable[[], Any]) -> Any:
    """Return what ``make`` derives from the groups, made once for all layers and models that see the row."""
    if name not in groups.derived:
        groups.derived[name] = make()
    return groups.derived[name]


def membership(groups: Iterable[Group]) -> tuple[Tensor, Tensor]:
    """Return the index of each token's group, and within it 0 for the prompt or the number of the completion."""
    lengths = [(group.prompt, *group.completions) for group in groups]
    group = torch.cat([torch.full((sum(parts),), i) for i, parts in enumerate(lengths)])
    member = torch.cat([torch.full((n,), i) for parts in lengths for i, n in enumerate(parts)])
    return group, member


def visibility_mask(groups: Sequence[Group], device: torch.device) -> Tensor:
    """Return ``(L, L)``, true where the token of a row attends to the token of a column."""
    group, member = membership(groups)
    position = torch.arange(len(group))
    in_prompt_or_itself = (member == 0) | (member == member[:, None])
    visible = in_prompt_or_itself & (group == group[:, None]) & (position <= position[:, None])
    return copy_async(visible, device)
