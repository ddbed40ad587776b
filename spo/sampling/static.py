"""A decoding loop with a preallocated cache of keys and values, which drops finished rows from the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from spo.batching import split_by_tokens
from spo.forward.head import base_model
from spo.forward.sharding import needs_all_processes
from spo.sampling.draw import next_tokens

CHECK_TOKENS, NOTICE_TOKENS = 16, 4
"""Tokens between two checks for finished rows on an accelerator, and tokens by which the copy to the host precedes each
check, so that the host does not wait for an idle device. Superfluous tokens cost less than checks at every token."""

MAX_PREFILL_TOKENS = 2048
"""Tokens of prompts that are forwarded at once: enough to keep a device busy, few enough to need little padding."""


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of a layer, written in place. Attention sees the filled part, like that of a growing cache.

    Args:
        rows: Rows of the batch.
        width: Positions to allocate.
        padded: Whether rows have padding. If so, transformers makes the mask without checking it, which would wait
            for the device at every token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, rows: int, width: int, padded: bool) -> None:
        super().__init__()
        self.shape = rows, width
        self.show(slice(rows), 0, 0)
        self.is_compileable = padded

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros of the dtype and sizes of the first states; attention gives padding the weight 0."""
        rows, width = self.shape
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], width, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def show(self, rows: slice, start: int, end: int) -> None:
        """Let the model see only ``rows``, filled from position ``start`` to ``end``."""
        self.rows, self.start, self.end = rows, start, end

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add ``(N, heads, T, size)`` keys and values, and return those of all positions so far, without a copy."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, self.end = slice(self.end, self.end + key_states.shape[2]), self.end + key_states.shape[2]
        self.keys[self.rows, :, new], self.values[self.rows, :, new] = key_states, value_states
        filled = slice(self.start, self.end)
        return self.keys[self.rows, :, filled], self.values[self.rows, :, filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of positions that attention will see, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of positions so far."""
        return self.end - self.start

    def get_max_length(self) -> int:
        """Return the number of allocated positions."""
        return self.shape[1]

    def keep(self, rows: int, holes: Tensor, movers: Tensor) -> None:
        """Keep the first ``rows`` rows, after copying the rows at ``movers`` to ``holes``."""
        for states in (self.keys, self.values):
            states[holes, :, : self.end] = states[movers, :, : self.end]
        self.keys, self.values, self.rows = self.keys[:rows], self.values[:rows], slice(rows)


class PreallocatedCache(Cache):
    """A cache of :class:`PreallocatedLayer`, made as the model asks for them."""

    layers: list[PreallocatedLayer]  # type: ignore[assignment]  # A list is invariant, and these are its only kind.

    def __init__(self, rows: int, width: int, padded: bool) -> None:
        new_layer: Any = self._new_layer  # Declared as a class by transformers, which only calls it.
        super().__init__(layer_class_to_replicate=new_layer)
        self.shape, self.padded = (rows, width), padded
        self.show(slice(rows), 0, 0)

    def _new_layer(self) -> PreallocatedLayer:
        layer = PreallocatedLayer(*self.shape, self.padded)
        layer.show(*self.shown)
        return layer

    def show(self, rows: slice, start: int, end: int) -> None:
        """Let the model see only ``rows`` in every layer, filled from position ``start`` to ``end``."""
        self.shown = rows, start, end
        for layer in self.layers:
            layer.show(rows, start, end)

    def keep(self, rows: int, holes: Tensor, movers: Tensor) -> None:
        """Keep the first ``rows`` rows in every layer, after copying the rows at ``movers`` to ``holes``."""
        for layer in self.layers:
            layer.keep(rows, holes, movers)


def unsupported(model: nn.Module) -> str | None:
    """Return the reason why the loop does not support a model, or ``None`` if it does.

    A model has to attend to keys and values by position alone. A sliding window is supported: the mask of such a model
    leaves out what is before the window.
    """
    base: Any = base_model(model)
    if needs_all_processes(model):
        return "its weights are sharded, and all ranks have to take the same number of steps"
    if not isinstance(base, PreTrainedModel) or type(base).is_custom_code():
        return "it is not a model of transformers"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "its adapter learns a prompt"
    if base.config.is_encoder_decoder:
        return "it has an encoder"
    if base._is_stateful or not base._supports_default_dynamic_cache():  # type: ignore[operator]  # stubs: Tensor
        return "it has a state instead of keys and values"
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    if other := {type(layer).__name__ for layer in DynamicCache(config=base.config).layers if type(layer) not in plain}:
        return f"its layers hold more than keys and values ({', '.join(sorted(other))})"
    if own := _overridden_generation_methods(type(base)):
        return f"it overrides methods of generation ({', '.join(own)})"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "it does not take position ids, and padding would shift its positions"
    return None


def _overridden_generation_methods(model: type[nn.Module]) -> list[str]:
    """Return the names of the methods of ``GenerationMixin`` that a class overrides."""
    shared = [name for name, value in vars(GenerationMixin).items() if inspect.isfunction(value)]
    return [name for name in shared if getattr(model, name, None) is not getattr(GenerationMixin, name)]


def cache_keyword(model: nn.Module) -> str:
    """Return the name under which a model takes its cache; transformers renamed ``past_key_values`` to ``cache``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def decode(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    numbers: Tensor,
    *,
    temperature: float,
    stop_ids: Seq[int],
    pad_token_id: int,
    top_p: float = 1.0,
) -> Tensor:
    """Draw completions of a batch of prompts.

    Args:
        model: Model that is not :func:`unsupported`.
        ids: ``(N, T)`` token ids of the prompts, left-padded.
        mask: ``(N, T)`` 1 on their tokens, 0 on padding.
        numbers: ``(N, new)`` uniform numbers in [0, 1), one for each token to draw; ``new`` is the length limit.
        temperature: Temperature of the softmax; 0 decodes greedily.
        stop_ids: Tokens that end a completion.
        pad_token_id: Token id that fills the rest of the row.
        top_p: Probability that the nucleus of each token has to reach; 1 draws from all tokens.

    Returns:
        ``(N, new)`` token ids.
    """
    (n, width), limit = ids.shape, numbers.shape[1]
    lengths = mask.sum(1).tolist()
    states = PreallocatedCache(n, width + limit, padded=min(lengths) < width)
    more: dict[str, Any] = {cache_keyword(base_model(model)): states}
    if base_model(model)._supports_logits_to_keep():
        more["logits_to_keep"] = 1

    def forward(ids: Tensor, positions: Tensor, attended: Tensor | None) -> Tensor:
        output = model(
            input_ids=ids,
            attention_mask=attended,
            position_ids=positions,
            use_cache=True,
            return_dict=True,
            **more,
        )
        return output.logits[:, -1].float()  # In float32, as `generate` does, so that both draw the same tokens.

    positions = (mask.cumsum(1) - 1).clamp(min=0)
    prefilled = []
    for rows, start in _parts(lengths, width):
        states.show(rows, start, start)
        padding = mask[rows, start:] if min(lengths[rows]) < width - start else None
        prefilled.append(forward(ids[rows, start:], positions[rows, start:], padding))
    states.show(slice(n), 0, width)
    logits = torch.cat(prefilled)

    # From here on, tensors have a row for each unfinished completion, in an order that changes as finished rows leave:
    # `active` has their row in the batch.
    attended = nn.functional.pad(mask, (0, limit), value=1) if states.padded else None
    positions = positions[:, -1]
    completions, stops = ids.new_full((n, limit), pad_token_id), torch.tensor(stop_ids, device=ids.device)
    active, finished = torch.arange(n, device=ids.device), torch.zeros(n, dtype=torch.bool, device=ids.device)
    every, notice = _check_schedule(ids.device)
    for step in range(limit):
        tokens = next_tokens(logits, numbers[:, step], temperature, top_p).masked_fill(finished, pad_token_id)
        completions[active, step] = tokens
        finished |= torch.isin(tokens, stops)
        if step + 1 == limit:
            break
        if (step + 1 + notice) % every == 0:
            ended_rows = _copy_to_host(finished)
        if (step + 1) % every == 0 and any(ended := ended_rows()):
            if all(ended):
                break
            order, holes, movers = _compaction(ended, ids.device)
            states.keep(len(order), holes, movers)
            before = (tokens, positions, numbers, active, finished)
            tokens, positions, numbers, active, finished = (tensor[order] for tensor in before)
            attended = attended[order] if attended is not None else None
        positions = positions + 1
        visible = attended[:, : width + step + 1] if attended is not None else None
        logits = forward(tokens[:, None], positions[:, None], visible)
    return completions


def _check_schedule(device: torch.device) -> tuple[int, int]:
    """Return after how many tokens finished rows leave the batch, and how many tokens earlier they are noticed."""
    return (1, 0) if device.type == "cpu" else (CHECK_TOKENS, NOTICE_TOKENS)


def _copy_to_host(flags: Tensor) -> Callable[[], list[bool]]:
    """Start to copy flags to the host, and return the function that waits for the copy."""
    if not flags.is_cuda:
        return flags.tolist
    copy = flags.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(flags.device).record_event()

    def wait() -> list[bool]:
        copied.synchronize()
        return copy.tolist()

    return wait


def _parts(lengths: list[int], width: int) -> Iterator[tuple[slice, int]]:
    """Yield neighboring rows to forward together, and the column where the longest of them starts."""
    for rows in split_by_tokens([(length, 1) for length in lengths], max_tokens=MAX_PREFILL_TOKENS):
        yield rows, width - max(lengths[rows])


def _compaction(ended: list[bool], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Plan how unfinished rows fill the gaps of finished ones, so that few rows of the cache are copied.

    Args:
        ended: Whether each row is finished.
        device: Device of the results.

    Returns:
        The unfinished rows in their new order, the finished rows to overwrite, and the rows that move there.
    """
    going = [row for row, is_over in enumerate(ended) if not is_over]
    holes = [row for row, is_over in enumerate(ended[: len(going)]) if is_over]
    movers = going[len(going) - len(holes) :]
    order = list(range(len(going)))
    for hole, mover in zip(holes, movers, strict=True):
        order[hole] = mover
    return (
        torch.tensor(order, dtype=torch.long, device=device),
        torch.tensor(holes, dtype=torch.long, device=device),
        torch.tensor(movers, dtype=torch.long, device=device),
    )
