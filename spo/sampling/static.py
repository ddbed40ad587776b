"""A decoding loop of our own: keys and values in memory that is there from the start, finished rows left out."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from spo.sampling.draw import next_tokens

TOKENS_BETWEEN_CHECKS = 16
"""On an accelerator: to ask which rows are finished waits for the device, so a few tokens too many are cheaper."""


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of a layer, written in place. Attention sees what is filled, as of a growing cache.

    Args:
        width: positions there is room for.
        padded: whether rows have padding. Where it is known that they have, the mask is made without asking, which
            would wait for the device at every token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, width: int, padded: bool) -> None:
        super().__init__()
        self.width, self.filled = width, 0
        self.is_compileable = padded

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes the memory, in the shape of what arrives first."""
        self.keys, self.values = (
            states.new_empty(*states.shape[:2], self.width, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds ``(N, heads, T, size)`` keys and values; returns those of all positions so far, without a copy."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions that attention will see, and the first of them."""
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        """Positions so far."""
        return self.filled

    def get_max_length(self) -> int:
        """Positions there is room for."""
        return self.width

    def keep(self, rows: int, holes: Tensor, movers: Tensor) -> None:
        """Leaves the first ``rows`` rows, those at ``movers`` put in place of those at ``holes``."""
        for states in (self.keys, self.values):
            states[holes, :, : self.filled] = states[movers, :, : self.filled]
        self.keys, self.values = self.keys[:rows], self.values[:rows]


class PreallocatedCache(Cache):
    """As many :class:`PreallocatedLayer` as a model asks for."""

    layers: list[PreallocatedLayer]  # type: ignore[assignment]

    def __init__(self, width: int, padded: bool) -> None:
        super().__init__(layer_class_to_replicate=partial(PreallocatedLayer, width, padded))  # type: ignore[arg-type]

    def keep(self, rows: int, holes: Tensor, movers: Tensor) -> None:
        """Leaves the first ``rows`` rows in every layer, those at ``movers`` put in place of those at ``holes``."""
        for layer in self.layers:
            layer.keep(rows, holes, movers)


def unsupported(model: nn.Module) -> str | None:
    """Why the loop cannot decode with ``model``, which has to attend to keys and values by position alone.

    A window is no hindrance: the mask that such a model makes leaves out what lies before it.
    """
    base = base_model(model)
    if isinstance(model, FSDPModule):
        return "its weights are sharded, and all ranks have to take the same number of steps"
    if not isinstance(base, PreTrainedModel) or type(base).is_custom_code():
        return "it is not a model of transformers"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "its adapter learns a prompt"
    if base.config.is_encoder_decoder:
        return "it has an encoder"
    if base._is_stateful or not base._supports_default_dynamic_cache():  # type: ignore[operator]
        return "it keeps a state in place of keys and values"
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    if other := {type(layer).__name__ for layer in DynamicCache(config=base.config).layers if type(layer) not in plain}:
        return f"its layers hold more than keys and values ({', '.join(sorted(other))})"
    if own := _own_generation(type(base)):
        return f"it has a way of its own to generate ({', '.join(own)})"
    return None


def base_model(model: nn.Module) -> nn.Module:
    """The model that adapters are part of."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _own_generation(model: type[nn.Module]) -> list[str]:
    shared = [name for name, value in vars(GenerationMixin).items() if inspect.isfunction(value)]
    return [name for name in shared if getattr(model, name, None) is not getattr(GenerationMixin, name)]


@torch.no_grad()
def decode(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    numbers: Tensor,
    *,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
) -> Tensor:
    """Completions of a batch of prompts.

    Args:
        model: one that is not :func:`unsupported`.
        ids: ``(N, T)`` prompts, left-padded.
        mask: ``(N, T)`` 1 on their tokens, 0 on padding.
        numbers: ``(N, new)`` uniform in [0, 1): a row's draws; their number is the limit of a completion.
        temperature: of the softmax, or 0.
        eos_token_id: ends a completion.
        pad_token_id: follows it.

    Returns:
        ``(N, new)`` tokens.
    """
    (n, width), limit = ids.shape, numbers.shape[1]
    padded = not bool(mask.all())
    states = PreallocatedCache(width + limit, padded)
    settings: dict[str, Any] = {"past_key_values": states, "use_cache": True, "return_dict": True}
    takes = inspect.signature(base_model(model).forward).parameters
    if "logits_to_keep" in takes:
        settings["logits_to_keep"] = 1
    attended = nn.functional.pad(mask, (0, limit), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    every = 1 if ids.device.type == "cpu" else TOKENS_BETWEEN_CHECKS

    # What the loop holds are the rows that go on, in an order that changes when finished ones are left out.
    completions = ids.new_full((n, limit), pad_token_id)
    rows, finished = torch.arange(n, device=ids.device), torch.zeros(n, dtype=torch.bool, device=ids.device)
    for step in range(limit):
        if padded:
            settings["attention_mask"] = attended[:, : width + step]
        if "position_ids" in takes:
            settings["position_ids"] = positions
        # generate, too, widens or narrows to float32
        logits = model(input_ids=ids, **settings).logits[:, -1].float()
        tokens = next_tokens(logits, numbers[:, step], temperature).masked_fill(finished, pad_token_id)
        completions[rows, step] = tokens
        finished |= tokens == eos_token_id
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        if (step + 1) % every == 0 and any(ended := finished.tolist()):
            order, holes, movers = _closed_up(ended, ids.device)
            if not len(order):
                break
            states.keep(len(order), holes, movers)
            held = (ids, positions, attended, numbers, rows, finished)
            ids, positions, attended, numbers, rows, finished = (tensor[order] for tensor in held)
    return completions


def _closed_up(ended: list[bool], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that go on, with the last of them (``movers``) in the places of those that ended (``holes``)."""
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
