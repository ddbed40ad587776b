"""The probes that decide in which batches a model may run: they compare log-probs in packed, padded and single rows."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig

from spo.forward.attention import back_ends, is_registered, record_attention_modules, register_packed_attention
from spo.forward.head import base_model, completion_logits
from spo.forward.modes import default_generation_config, eval_mode
from spo.forward.neighbors import Company, company_of, rope_thresholds
from spo.forward.packing import pack
from spo.forward.sharding import compute_dtype, needs_all_processes
from spo.ops import completion_targets, token_logps
from spo.types import pad_prompts, pad_sequences

log = logging.getLogger(__name__)

MAX_DIFFERENCE_NATS = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Largest accepted difference of packed and padded log-probs of a token, which is rounding in another order.

transformers rounds to float32 inside of float64 models too. In half precision, where the limit is 0.1, rounding hides
small errors; the check that no sequence changes another one is exact in every dtype.
"""
MAX_ROUNDING_NATS = 1e-3
"""Largest difference of a token's log-probs in a batch and alone that may be rounding, in float32 and float64."""
RELATIVE_ROUNDING = 2e-6
"""Difference of log-probs in float32 that is rounding in any case, as a share of the largest log-prob."""
MAX_MEDIAN_NATS = 0.1
"""Largest median difference over the tokens of a row in half precision, in which single tokens may go astray."""
LENGTH_SETTING = re.compile("window|chunk|block_size|conv|index_topk")
"""Settings of architectures that, as numbers of tokens, may be a length beyond which a model computes otherwise."""
MAX_PROBED_SETTING = 256
"""Longest of these lengths that the probe exceeds; beyond it, the cost of the probe would show."""
PROBED_NEW_TOKENS = 3
Rows = Sequence[tuple[list[int], list[int]]]


# --- rows beside other rows ---------------------------------------------------------------------------------------


class Drawing(NamedTuple):
    """Rows and settings with which samples of a model are right.

    Attributes:
        company: Prompts that may be drawn in one batch, padded on the left.
        cache: Whether ``generate`` with a cache computes what a plain forward pass over the whole prefix does.
    """

    company: Company = Company.ANY
    cache: bool = True


def probe_company(model: nn.Module) -> Company:
    """Return the rows beside which a model computes for a right-padded sequence what it does for it alone.

    A few short rows are compared when the function is called first for a model. Lengths that change
    positions according to the configuration are left out: :func:`spo.forward.neighbors.scale_of` keeps them apart.

    Args:
        model: Hugging Face causal language model, or one with an adapter. It keeps the result as ``company``.
    """
    causal = base_model(model)
    if not hasattr(causal, "company"):
        found = _probed(model, _scores_as_alone)
        causal.company = Company.NONE if found is None else found
    return company_of(causal)


def probe_drawing(model: nn.Module) -> Drawing:
    """Return how ``generate`` draws from a model what plain forward passes over each sequence alone would draw.

    Args:
        model: Hugging Face causal language model, or one with an adapter. It keeps the result as ``drawing``.
    """
    causal = base_model(model)
    if not hasattr(causal, "drawing"):
        company = _probed(model, _generates_as_alone)
        # Without a cache, rows of a batch have equal lengths, which is a matter of the forward pass.
        causal.drawing = Drawing(probe_company(model), cache=False) if company is None else Drawing(company)
    return causal.drawing


def _probed(model: nn.Module, holds: Callable[[nn.Module, Rows], bool]) -> Company | None:
    """Return the company in which a claim about a model holds for short rows; ``None`` if not even for single rows.

    Any company is right for a model that does not take such rows at all.
    """
    device = next(model.parameters()).device
    with eval_mode(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            rows = _rows_around_lengths(base_model(model).config.get_text_config())
            _token_logps(model, rows[:1], packed=False)
        except Exception:  # Such as a table of few prefixes.
            return Company.ANY
        batches: dict[Company, list[Rows]] = {
            Company.ANY: [rows],
            Company.EQUAL_LENGTHS: [[row, (row[0], row[1][::-1])] for row in rows],
            Company.NONE: [[row] for row in rows],
        }
        for company, of_company in batches.items():
            try:
                if all(holds(model, batch) for batch in of_company):
                    return company
            except Exception as error:  # Architectures fail in many ways on input that they were not made for.
                log.debug("%s in batches of %s: %s", type(model).__name__, company.name, error)
    return None


def _scores_as_alone(model: nn.Module, rows: Rows) -> bool:
    """Return whether the log-probs of a right-padded batch are those of each row alone."""
    batch = _token_logps(model, rows, packed=False).split([len(completion) for _, completion in rows])
    alone = [_token_logps(model, [row], packed=False) for row in rows]
    return all(map(_comparison(model, rows), batch, alone))


def _comparison(model: nn.Module, rows: Rows) -> Callable[[Tensor, Tensor], bool]:
    """Return the function that decides whether log-probs in a batch and alone are the same but for rounding.

    How much a model rounds is what a second row of equal length changes, as nothing is padded then.
    """
    row = rows[0]
    alone = _token_logps(model, [row], packed=False)
    beside = _token_logps(model, [row, (row[0], row[1][::-1])], packed=False)[: len(alone)]
    rounding = float(_differences(beside, alone).max())
    exact = compute_dtype(model) in MAX_DIFFERENCE_NATS

    def same(got: Tensor, want: Tensor) -> bool:
        difference = _differences(got, want)
        if not exact:
            return bool(difference.median() <= max(MAX_MEDIAN_NATS, 4 * rounding))
        size = float(want.masked_fill(~want.isfinite(), 0).abs().max())
        return bool(difference.max() <= min(max(RELATIVE_ROUNDING * size, 10 * rounding), MAX_ROUNDING_NATS))

    return same


def _differences(got: Tensor, want: Tensor) -> Tensor:
    return (got - want).abs().masked_fill(got == want, 0)  # Log-probs of masked tokens are -inf in both.


def _rows_around_lengths(config: Any) -> Rows:
    """Return random rows: two that exceed the lengths in a configuration, one that does when it grows, a short one."""
    longest = max([8, *(length for length in _lengths(config.to_dict()) if length <= MAX_PROBED_SETTING)]) + 8
    limits = [length for _, length in rope_thresholds(config)]
    limits.append(getattr(config, "max_position_embeddings", None) or longest + PROBED_NEW_TOKENS)
    longest = max(min(longest, min(limits) - PROBED_NEW_TOKENS), 3)
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(config.vocab_size, (n,), generator=generator).tolist()

    return [(ids(1), ids(n - 1)) for n in (longest, longest - 1, max(longest - 9, 3), 2)]


def _lengths(settings: dict[str, Any]) -> Iterator[int]:
    """Yield the numbers among nested settings that may be lengths."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _lengths(value)
        elif isinstance(value, int) and not isinstance(value, bool) and LENGTH_SETTING.search(name):
            yield value


def _generates_as_alone(model: Any, rows: Rows) -> bool:
    """Return whether ``generate`` computes for padded prompts what a forward pass over each of them alone does."""
    prompts = [prompt + completion for prompt, completion in rows]
    device, padding = next(model.parameters()).device, _padding(model)
    ids, mask = pad_prompts(prompts, padding, device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=PROBED_NEW_TOKENS,
        pad_token_id=padding,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=True,
    )
    with default_generation_config(model):
        drawn = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            synced_gpus=needs_all_processes(model),
        )
    completions = drawn.sequences[:, ids.shape[1] :].tolist()
    found, same = torch.stack(drawn.logits, dim=1).float().log_softmax(-1), _comparison(model, rows)
    for got, prompt, completion in zip(found, prompts, completions, strict=True):
        alone = completion_logits(model, pad_sequences([(prompt, completion)], padding).to(device))
        if not same(got, alone.float().log_softmax(-1)):
            return False
    return True


# --- packed rows --------------------------------------------------------------------------------------------------


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
        difference = float(_differences(packed, padded).max())
        # Written so that NaN is rejected.
        if not difference <= MAX_DIFFERENCE_NATS.get(compute_dtype(model), 0.1):
            return f"packed and padded log-probs differ by {difference:.2g} nats"
        with eval_mode(model):
            if _leaks(model, rows):
                return "a sequence in a packed row changes another one"
        if probe_company(model) is not Company.ANY:
            return "a sequence in a batch changes another one"
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


def _padding(model: nn.Module) -> int:
    """Return a token to pad with that is not the model's own, whose embedding may be zero and hide its effect."""
    own = getattr(base_model(model).config.get_text_config(), "pad_token_id", None)
    return 1 if own == 0 else 0


def _token_logps(model: nn.Module, rows: Rows, packed: bool) -> Tensor:
    sequences = pad_sequences(rows, _padding(model))
    sequences = pack(sequences, share_prompts=True) if packed else sequences
    sequences = sequences.to(next(model.parameters()).device)
    logits = completion_logits(model, sequences)
    return token_logps(logits, completion_targets(sequences))
