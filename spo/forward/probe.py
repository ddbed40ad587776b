"""The probe that decides whether a model may run on packed rows: it compares packed and padded log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from spo.forward.attention import back_ends, is_registered, record_attention_modules, register_packed_attention
from spo.forward.head import base_model, completion_logits
from spo.forward.modes import eval_mode
from spo.forward.packing import pack
from spo.ops import completion_targets, token_logps
from spo.types import pad_sequences

MAX_DIFFERENCE_NATS = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Largest accepted difference of packed and padded log-probs of a token, which is rounding in another order.

transformers rounds to float32 inside of float64 models too. In half precision, where the limit is 0.1, rounding hides
small errors; the check that no sequence changes another one is exact in every dtype.
"""
Rows = Sequence[tuple[list[int], list[int]]]


def enable_packing(model: nn.Module) -> str | None:
    """Let a model take packed rows, if it computes the same with them as with padded batches.

    A model is accepted if each layer calls the attention function once, with only those keywords that packed attention
    supports; if the log-probs of random token ids equal those of the padded batch; and if no sequence changes another.

    Args:
        model: Hugging Face causal language model, or one with an adapter. A rejected model stays as it was.

    Returns:
        The reason for the rejection, or ``None`` for an accepted model.
    """
    causal = base_model(model)
    original = getattr(getattr(causal, "config", None), "_attn_implementation", None)
    if original is None or not getattr(causal, "_can_set_attn_implementation", bool)():
        return "its attention implementation cannot be set"
    if is_registered(original):
        return None
    if original not in ("sdpa", "eager"):
        return f"packing does not support model.attn_implementation={original}; use sdpa"
    config = causal.config.get_text_config()
    if layers := set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        return f"it has layers of {' and '.join(sorted(layers))}"
    reason: str | None = None
    for back_end in back_ends(next(model.parameters()).device):
        causal.set_attn_implementation(register_packed_attention(back_end, original))
        causal.takes_packed_rows = True
        reason = _reason_to_reject(model, config)
        if reason is None:
            return None
    causal.takes_packed_rows = False
    causal.set_attn_implementation(original)
    return reason


def _reason_to_reject(model: nn.Module, config: Any) -> str | None:
    rows = _random_rows(config.vocab_size)
    try:
        with eval_mode(model), torch.no_grad():
            padded = _token_logps(model, rows, packed=False)
            with record_attention_modules() as modules:
                packed = _token_logps(model, rows, packed=True)
        calls, distinct = len(modules), len(set(modules))
        if not calls == distinct == config.num_hidden_layers:
            return f"attention was called {calls} times in {distinct} places, for {config.num_hidden_layers} layers"
        difference = float((packed - padded).abs().max())
        # Written so that NaN is rejected.
        if not difference <= MAX_DIFFERENCE_NATS.get(next(model.parameters()).dtype, 0.1):
            return f"packed and padded log-probs differ by {difference:.2g} nats"
        with eval_mode(model):
            if _leaks(model, rows):
                return "a sequence in a packed row changes another one"
        if model.training:  # Dropout acts in this mode only, and not every back end supports it.
            with torch.no_grad(), torch.random.fork_rng():
                _token_logps(model, rows, packed=True)
    except Exception as error:  # Architectures fail in many ways on input that they were not made for.
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _leaks(model: nn.Module, rows: Rows) -> bool:
    """Return whether the completion of the last sequence changes the log-probs of the others.

    The gradient answers it: it is exactly zero in every dtype where nothing depends on that completion. The log-probs
    themselves may change in their last bits, as in mixtures of experts, whose experts then get other numbers of tokens.
    """
    last = len(rows[-1][1])
    others = sum(len(completion) for _, completion in rows[:-1])
    if isinstance(model, FSDPModule):  # Gradients of sharded weights belong to a step, so compare the log-probs.
        edited = [*rows[:-1], (rows[-1][0], rows[-1][1][::-1])]
        with torch.no_grad():
            before, after = (_token_logps(model, each, packed=True)[:others] for each in (rows, edited))
        return not torch.equal(before, after)
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = base_model(model).get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            total = _token_logps(model, rows, packed=True)[:others].sum()
        [gradient] = torch.autograd.grad(total, embedded)
    finally:
        handle.remove()
    return bool(gradient[0, -last:].any())  # The last sequence ends the row.


def _random_rows(vocab_size: int) -> Rows:
    """Return two completions of one prompt, one of a prompt of one token, and three of another prompt."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(vocab_size, (n,), generator=generator).tolist()

    first, second, third = ids(7), ids(1), ids(4)
    lengths = [(first, 5), (first, 9), (second, 1), (third, 3), (third, 1), (third, 6)]
    return [(prompt, ids(n)) for prompt, n in lengths]


def _token_logps(model: nn.Module, rows: Rows, packed: bool) -> Tensor:
    sequences = pad_sequences(rows, pad_token_id=0)
    sequences = pack(sequences, share_prompts=True) if packed else sequences
    sequences = sequences.to(next(model.parameters()).device)
    logits = completion_logits(model, sequences)
    return token_logps(logits, completion_targets(sequences))
