"""Runs a causal language model on sequences: its logits at completion tokens, by the model's own head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from spo.ops.logps import DeferredLogits, Logits, completion_targets, sum_per_sequence, token_logps
from spo.types import Sequences

NO_MASK = (1, 1, 1, 1)
"""Shape of the mask that packed rows are given, which says nothing: what is visible follows from their groups."""


def _head(model: Any) -> Any:
    # The parameter is Any because nn.Module types every attribute that it does not declare as a tensor or a module.
    return model.get_output_embeddings()


@contextmanager
def _head_is_given(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Lets the language-model head run on other hidden states than those that reach it.

    The model's own forward stays in charge, so soft-capping, scaling and biases apply as the architecture defines
    them.

    Args:
        model: a Hugging Face causal language model.
        change: from the ``(N, T, H)`` that reach the head to the ``(1, m, H)`` that it is given.
    """

    def changed(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = args
        return (change(hidden), *rest)

    handle = _head(model).register_forward_pre_hook(changed)
    try:
        yield
    finally:
        handle.remove()


class _Output(tuple[Tensor]):
    """What a backbone returns, reduced to its hidden states, for a caller that indexes it or names its fields."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def base_model(model: nn.Module) -> Any:
    """The Hugging Face model that an adapter is part of, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


@contextmanager
def _without_backbone(model: nn.Module, states: Tensor) -> Iterator[None]:
    """The part below the head returns ``states`` at no cost.

    Where an architecture calls another part than the one it names as its base, that part runs as it is: the head
    ignores what it computes.
    """
    causal = base_model(model)
    backbone = causal.base_model
    if backbone is causal:
        yield
        return
    own = vars(backbone).get("forward")
    backbone.forward = lambda *_, **__: _Output((states,))
    try:
        yield
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own


def head_logits(model: nn.Module, states: Tensor) -> Tensor:
    """``(m, V)`` logits from ``(m, H)`` hidden states, by the head and whatever the model does after it."""
    states = states.unsqueeze(0)
    token = torch.zeros((1, 1), dtype=torch.long, device=states.device)
    with _head_is_given(model, lambda _: states), _without_backbone(model, states):
        return model(input_ids=token, use_cache=False).logits.squeeze(0)


def _forward(model: nn.Module, sequences: Sequences) -> Tensor:
    """Logits of a whole forward pass, packed where the sequences are."""
    packed = sequences.packed
    if packed is None:
        mask = sequences.attention_mask.long()
        return model(input_ids=sequences.input_ids, attention_mask=mask, use_cache=False).logits
    if not getattr(model, "takes_packed_rows", False):  # it would let the sequences see each other
        raise RuntimeError(f"{type(model).__name__} was not made ready for packed rows: see spo.forward.packing")
    return model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        # Four dimensions: transformers makes no mask of its own, and the packed attention reads the groups instead.
        attention_mask=torch.ones(NO_MASK, dtype=torch.bool, device=packed.input_ids.device),
        packed_groups=packed.groups,
        use_cache=False,
    ).logits


def _predictors(sequences: Sequences) -> Tensor:
    if sequences.packed is not None:
        return sequences.packed.predictors
    return sequences.completion_index - 1


def completion_states(model: nn.Module, sequences: Sequences) -> Tensor:
    """``(M, H)`` hidden states, as the head is given them, from which the completion tokens are predicted."""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden.flatten(0, 1).index_select(0, _predictors(sequences)))
        return hidden[:1, :0]  # no row is left for the head

    with _head_is_given(model, keep):
        _forward(model, sequences)
    return found[0]


def can_defer(model: nn.Module) -> bool:
    """Whether logits can be made from hidden states later on: the head is a matrix, and no adapter changes it.

    With an adapter on the head, whose module is then another one, logits follow from the adapter's state as well.
    """
    return isinstance(_head(model), nn.Linear)


def deferred_logits(model: nn.Module, states: Tensor, max_logits: int | None) -> DeferredLogits:
    """Logits that ``model``'s head makes from ``(M, H)`` states, at most ``max_logits`` of them at one time."""
    vocabulary = _head(model).weight.shape[0]
    rows = len(states) if max_logits is None else max_logits // vocabulary
    return DeferredLogits(states, partial(head_logits, model), max(rows, 1))


@overload
def completion_logits(
    model: nn.Module, sequences: Sequences, *, completion_only: bool = True, max_logits: None = None
) -> Tensor: ...


@overload
def completion_logits(
    model: nn.Module, sequences: Sequences, *, completion_only: bool = True, max_logits: int | None
) -> Logits: ...


def completion_logits(
    model: nn.Module, sequences: Sequences, *, completion_only: bool = True, max_logits: int | None = None
) -> Logits:
    """Next-token logits that predict the completion tokens.

    Args:
        model: a Hugging Face causal language model.
        sequences: ``N`` sequences with ``M`` completion tokens in all.
        completion_only: whether the head runs for these tokens alone, instead of for prompt and padding too.
        max_logits: most logits to exist at one time (of the head's own output; needs ``completion_only``); ``None`` for
            no limit.

    Returns:
        ``(M, V)`` in the model's dtype, sequence after sequence; deferred where they are more than ``max_logits``.
    """
    if not completion_only:
        return _forward(model, sequences).flatten(0, 1).index_select(0, _predictors(sequences))
    rows = _predictors(sequences)
    if max_logits is not None and can_defer(model):
        vocabulary = _head(model).weight.shape[0]
        if len(rows) * vocabulary > max_logits:
            return deferred_logits(model, completion_states(model, sequences), max_logits)
    with _head_is_given(model, lambda hidden: hidden.flatten(0, 1).index_select(0, rows).unsqueeze(0)):
        return _forward(model, sequences).squeeze(0)


def completion_logps(model: nn.Module, sequences: Sequences, **how: Any) -> Tensor:
    """``(N,)`` log pi(completion | prompt) in nats, summed over completion tokens (end-of-text included).

    ``how`` are the options of :func:`completion_logits`.
    """
    logits = completion_logits(model, sequences, **how)
    return sum_per_sequence(token_logps(logits, completion_targets(sequences)), sequences)
