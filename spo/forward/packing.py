"""Packed rows through a Hugging Face decoder's own forward: the attention it calls, and the probe that accepts it.

transformers lets a model call an attention function by name. Ours reads how the row is made up from a keyword of the
forward, ``packed_groups``, and attends within the groups. Without the keyword it is the model's own attention, so that
generation and padded batches run as they always did.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from spo.batching import split_by_tokens
from spo.forward.head import NO_MASK, base_model, completion_logits
from spo.ops import completion_targets, token_logps
from spo.types import Group, Groups, pad_sequences

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Nats per token by which packed and padded log-probs may differ: rounding, in another order.

transformers rounds to float32 inside of float64 models too. In half precision, where 0.1 has to do, rounding hides
much, but not that one sequence is changed by another.
"""
MAX_MASKED_TOKENS = 256
"""Tokens that attend in one masked call, although most pairs of them are masked: shorter calls cost more than that."""
BLOCK = 128
"""Tokens in a block of FlexAttention's masks."""
IGNORABLE_KWARGS = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "use_cache",
}
"""Arguments, beside its own, that architectures give to attention without changing what it computes."""
T = TypeVar("T")


# --- attention -----------------------------------------------------------------------------------------------------


@torch.compiler.disable  # it follows the groups of each row: compiled, it would be compiled anew for each
def attend_by_group(
    query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Causal attention in which each completion of a packed row sees its prompt and itself.

    Args:
        query: ``(1, heads, L, d)``.
        key: ``(1, heads, L, d)``.
        value: ``(1, heads, L, d)``.
        groups: what lies in the row.
        scale: of the products; ``None`` for one over the root of d.
        dropout: of the attention weights.

    Returns:
        ``(1, heads, L, d)``.
    """
    calls = _kept(groups, ("calls", query.device), lambda: list(_calls(groups, query.device)))
    # split, and no slices: the gradient of a slice is a whole row of zeros around it
    queries, keys, values = (tensor.split([call.length for call in calls], dim=2) for tensor in (query, key, value))

    def seen(parts: Sequence[Tensor], call: _Call) -> Tensor:
        chosen = [parts[i] for i in call.sees]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)

    return torch.cat(
        [
            scaled_dot_product_attention(
                q,
                seen(keys, call),
                seen(values, call),
                attn_mask=call.mask,
                is_causal=call.mask is None,
                scale=scale,
                dropout_p=dropout,
            )
            for q, call in zip(queries, calls, strict=True)
        ],
        dim=2,
    )


class _Call(NamedTuple):
    """One call of the attention kernel, for ``length`` places of the row.

    ``sees`` are the numbers of the calls whose places they attend to; ``mask`` is ``None`` for causal attention.
    """

    length: int
    sees: tuple[int, ...]
    mask: Tensor | None


def _calls(groups: Groups, device: torch.device) -> Iterator[_Call]:
    """Small groups are masked together; of a large one the prompt runs alone, then its completions likewise.

    They are in the order of the row.
    """
    made = 0
    for run in _runs(groups.members, lambda group: group.length):
        [group, *others] = run
        length = sum(group.length for group in run)
        if not others and len(group.completions) == 1:
            calls = [_Call(length, (made,), None)]
        elif length <= MAX_MASKED_TOKENS:
            calls = [_Call(length, (made,), _visible(run, device))]
        else:
            calls = [_Call(group.prompt, (made,), None)]
            for lengths in _runs(group.completions, int):
                mask = _visible([Group(group.prompt, tuple(lengths))], device)[group.prompt :]
                calls.append(_Call(sum(lengths), (made, made + len(calls)), mask))
        made += len(calls)
        yield from calls


def _runs(items: Sequence[T], length: Callable[[T], int]) -> Iterator[Sequence[T]]:
    """Yield consecutive items in runs of at most ``MAX_MASKED_TOKENS`` tokens; a longer item is a run of its own."""
    runs = split_by_tokens([(1, length(item)) for item in items], max_tokens=MAX_MASKED_TOKENS)
    return (items[run] for run in runs)


@torch.compiler.disable
def _kept(groups: Groups, name: object, make: Callable[[], Any]) -> Any:
    if name not in groups.derived:
        groups.derived[name] = make()
    return groups.derived[name]


def _members(groups: Iterable[Group]) -> tuple[Tensor, Tensor]:
    """For each place of a row the number of its group, and within the group 0 for the prompt, else the completion's."""
    lengths = [(group.prompt, *group.completions) for group in groups]
    group = torch.cat([torch.full((sum(parts),), i) for i, parts in enumerate(lengths)])
    member = torch.cat([torch.full((n,), i) for parts in lengths for i, n in enumerate(parts)])
    return group, member


def _visible(groups: Sequence[Group], device: torch.device) -> Tensor:
    """``(L, L)`` true where the token of a row sees the one of a column."""
    group, member = _members(groups)
    place = torch.arange(len(group))
    seen = (member == 0) | (member == member[:, None])
    return (seen & (group == group[:, None]) & (place <= place[:, None])).to(device)


@torch.compiler.disable(recursive=False)
def attend_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """The same in one FlexAttention kernel, which skips the blocks that are masked out as a whole.

    Raises:
        ValueError: ``dropout`` is not 0: the kernel has none.
    """
    if dropout > 0:
        raise ValueError("FlexAttention has no dropout")
    mask = _kept(groups, ("blocks", query.device), lambda: _block_mask(groups, query.device))
    attend: Callable[..., Any] = flex_attention
    if query.is_cuda:
        attend = _compiled_flex_attention()
    return attend(query, key, value, block_mask=mask, scale=scale)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def _block_mask(groups: Groups, device: torch.device) -> BlockMask:
    """From the lengths alone: a mask of all pairs of tokens, of which blocks could be read off, would be quadratic."""
    group_of, member_of = (numbers.to(device) for numbers in _members(groups.members))

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        member = member_of[k]
        return (q >= k) & (group_of[q] == group_of[k]) & ((member == 0) | (member == member_of[q]))

    ends = list(accumulate(group.length for group in groups.members))
    starts = [0, *ends[:-1]]
    queries = range(0, ends[-1], BLOCK)
    # A block of queries needs the blocks from where the group of its first query begins up to itself.
    first = [starts[bisect_right(ends, query)] // BLOCK for query in queries]
    count = torch.tensor([block + 1 - seen for block, seen in enumerate(first)], dtype=torch.int32)
    places = torch.arange(len(queries), dtype=torch.int32)
    index = (torch.tensor(first, dtype=torch.int32)[:, None] + places).clamp(max=len(queries) - 1)
    return BlockMask.from_kv_blocks(
        count.to(device)[None, None],
        index.to(device)[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(ends[-1], ends[-1]),
    )


BACK_ENDS: dict[str, Callable[..., Tensor]] = {"flex": attend_by_blocks, "groups": attend_by_group}


def back_ends(device: torch.device) -> list[str]:
    """Names of those that are worth a try on a device, the fastest first."""
    return ["flex", "groups"] if device.type == "cuda" else ["groups"]


# --- as transformers calls it --------------------------------------------------------------------------------------

_registered: set[str] = set()
_modules_seen: list[nn.Module] | None = None
"""Attention modules that ran on a packed row, while the probe is looking."""


def _register(back_end: str, own: str) -> str:
    """Makes an attention implementation of transformers, and returns its name."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        packed_groups: Groups | None = None,
        **further: Any,
    ) -> tuple[Tensor, None]:
        if packed_groups is None:
            call = _own_attention(own, module)
            return call(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **further)
        if unheeded := sorted(name for name in further.keys() - IGNORABLE_KWARGS if further[name] is not None):
            raise ValueError(f"its attention takes {' and '.join(unheeded)}")
        if attention_mask is None or attention_mask.shape != NO_MASK or attention_mask.dtype != torch.bool:
            raise ValueError("it makes a mask of its own")
        if _modules_seen is not None:
            _modules_seen.append(module)
        shared_by = query.shape[1] // key.shape[1]
        if shared_by > 1:
            key, value = key.repeat_interleave(shared_by, dim=1), value.repeat_interleave(shared_by, dim=1)
        attended = BACK_ENDS[back_end](query, key, value, packed_groups, scaling, dropout)
        return attended.transpose(1, 2).contiguous(), None

    name = f"packed_{back_end}_{own}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    _registered.add(name)
    return name


def _own_attention(own: str, module: nn.Module) -> Callable[..., Any]:
    if own == "eager":  # each architecture has its own, in the file that defines it
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[own]


# --- the probe -----------------------------------------------------------------------------------------------------


def enable_packing(model: nn.Module) -> str | None:
    """Lets a model take packed rows, if it computes the same with them.

    Accepted is a model whose every layer calls the attention function once, with nothing that packed rows do not heed;
    whose log-probs of random ids are those of the padded batch; and in which no sequence is changed by another.

    Args:
        model: a Hugging Face causal language model, or one with an adapter. It is left as it was where it is refused.

    Returns:
        Why it is refused, or ``None``.
    """
    causal = base_model(model)
    own = getattr(getattr(causal, "config", None), "_attn_implementation", None)
    if own is None or not getattr(causal, "_can_set_attn_implementation", bool)():
        return "its attention cannot be chosen by name"
    if own in _registered:
        return None
    if own not in ("sdpa", "eager"):
        return f"it has no packed form of model.attn_implementation={own}; sdpa has one"
    config = causal.config.get_text_config()
    if layers := set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return f"it has layers of {' and '.join(sorted(layers))}"
    reason: str | None = None
    for back_end in back_ends(next(model.parameters()).device):
        causal.set_attn_implementation(_register(back_end, own))
        causal.takes_packed_rows = True
        reason = _refused(model, config)
        if reason is None:
            return None
    causal.takes_packed_rows = False
    causal.set_attn_implementation(own)
    return reason


def _refused(model: nn.Module, config: Any) -> str | None:
    global _modules_seen
    training = {module: module.training for module in model.modules()}
    in_training = model.training
    rows = _random_rows(config.vocab_size)
    model.eval()
    try:
        with torch.no_grad():
            unpacked = _token_logps(model, rows, packed=False)
            _modules_seen = []
            packed = _token_logps(model, rows, packed=True)
            calls, different = len(_modules_seen), len(set(_modules_seen))
        if not calls == different == config.num_hidden_layers:
            return f"attention was called {calls} times in {different} places, for {config.num_hidden_layers} layers"
        widest = float((packed - unpacked).abs().max())
        if not widest <= TOLERANCE.get(next(model.parameters()).dtype, 0.1):
            return f"packed and padded log-probs differ by {widest:.2g} nats"
        if _leaks(model, rows):
            return "a sequence is changed by another one of its row"
        if in_training:  # where dropout, if there is any, has to be possible
            for module, mode in training.items():
                module.training = mode
            with torch.no_grad(), torch.random.fork_rng():
                _token_logps(model, rows, packed=True)
    except Exception as error:  # whatever an architecture does with what it was not made for
        return " ".join(str(error).split())[:200] or type(error).__name__
    finally:
        _modules_seen = None
        for module, mode in training.items():
            module.training = mode
    return None


def _leaks(model: nn.Module, rows: list[tuple[list[int], list[int]]]) -> bool:
    """Whether the log-probs of all sequences but the last depend on the completion of the last.

    By the gradient, which is exactly zero where they do not, in every dtype. The log-probs themselves may change in
    their last bits, as those of experts do, which see other numbers of tokens.
    """
    last = len(rows[-1][1])
    kept = sum(len(completion) for _, completion in rows[:-1])
    if isinstance(model, FSDPModule):  # gradients of sharded weights are a step's own; the log-probs have to do
        edited = [*rows[:-1], (rows[-1][0], rows[-1][1][::-1])]
        with torch.no_grad():
            before, after = (_token_logps(model, each, packed=True)[:kept] for each in (rows, edited))
        return not torch.equal(before, after)
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = model.get_input_embeddings().register_forward_hook(keep)  # type: ignore[operator]
    try:
        with torch.enable_grad():
            others = _token_logps(model, rows, packed=True)[:kept].sum()
        [gradient] = torch.autograd.grad(others, embedded)
    finally:
        handle.remove()
    return bool(gradient[0, -last:].any())  # the last sequence ends the row


def _random_rows(vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Two completions of one prompt, one of a prompt of one token, and three of another; the last shares its prompt."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    first, second, third = ids(7), ids(1), ids(4)
    wanted = [(first, 5), (first, 9), (second, 1), (third, 3), (third, 1), (third, 6)]
    return [(prompt, ids(n)) for prompt, n in wanted]


def _token_logps(model: nn.Module, rows: list[tuple[list[int], list[int]]], packed: bool) -> Tensor:
    sequences = pad_sequences(rows, pad_token_id=0)
    sequences = sequences.pack(share_prompts=True) if packed else sequences
    sequences = sequences.to(next(model.parameters()).device)
    logits = completion_logits(model, sequences)
    return token_logps(logits, completion_targets(sequences))
