"""Runs a causal language model on sequences: its logits at completion tokens, by the model's own head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from spo.forward.modes import eval_mode
from spo.forward.neighbors import forward_apart
from spo.ops.logps import DeferredLogits, Logits
from spo.types import Sequences, pad_sequences

NO_MASK_SHAPE = (1, 1, 1, 1)
"""Shape of the mask passed with packed rows. It masks nothing: which tokens are visible follows from the groups."""


# These take `Any` where they read attributes, because nn.Module types every undeclared attribute as a tensor or module.
def base_model(model: Any) -> Any:
    """Return the Hugging Face model inside an adapter, or the model itself if it does not have one."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


@contextmanager
def _head_input(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the hidden states that the language-model head runs on.

    The model's own forward stays in charge, so soft-capping, scaling and biases apply as the architecture defines
    them.

    Args:
        model: Hugging Face causal language model.
        change: Function from the ``(N, T, H)`` hidden states that reach the head to the ``(1, m, H)`` that it gets.
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
    """The output of a backbone with hidden states alone: callers may index it or read any field, which is ``None``."""

    @property
    def last_hidden_state(self) -> Tensor:
        """Return the hidden states, ``(N, T, H)``."""
        return self[0]

    def __getattr__(self, name: str) -> None:
        # Special methods have to stay absent, or `copy` and the like would call None.
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _without_backbone(model: nn.Module, states: Tensor) -> Iterator[None]:
    """Make the part of the model below the head return ``states`` at no cost.

    Some architectures call another part than the one that they name as their base. That part runs as it is, and the
    head ignores what it computes.
    """
    causal = base_model(model)
    backbone = causal.base_model
    if backbone is causal:
        yield
        return
    # An instance may have a `forward` of its own already, as hooks of other libraries set one.
    own = vars(backbone).get("forward")
    backbone.forward = lambda *_, **__: _Output((states,))
    try:
        yield
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own


def head_logits(model: nn.Module, states: Tensor) -> Tensor:
    """Compute logits from hidden states, by the head and whatever the model does after it.

    Args:
        model: Hugging Face causal language model.
        states: ``(m, H)`` hidden states.

    Returns:
        ``(m, V)``.
    """
    states = states.unsqueeze(0)
    token = torch.zeros((1, 1), dtype=torch.long, device=states.device)
    with _head_input(model, lambda _: states), _without_backbone(model, states):
        return model(input_ids=token, use_cache=False).logits.squeeze(0)


def _forward(model: nn.Module, sequences: Sequences) -> Tensor:
    """Return the logits of a forward pass over the packed row, if there is one, or over the padded batch."""
    packed = sequences.packed
    if packed is None:
        mask = sequences.attention_mask.long()
        return model(input_ids=sequences.input_ids, attention_mask=mask, use_cache=False).logits
    if not getattr(model, "takes_packed_rows", False):  # Its sequences would see each other.
        raise RuntimeError(f"{type(model).__name__} cannot take packed rows: call spo.forward.probe.enable_packing")
    return model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        # A mask of four dimensions keeps transformers from making one; the packed attention reads the groups instead.
        attention_mask=torch.ones(NO_MASK_SHAPE, dtype=torch.bool, device=packed.input_ids.device),
        packed_groups=packed.groups,
        use_cache=False,
    ).logits


def _predictors(sequences: Sequences) -> Tensor:
    """Return the ``(M,)`` positions, in the flattened input, whose outputs predict the completion tokens."""
    if sequences.packed is not None:
        return sequences.packed.predictors
    return sequences.completion_index - 1


def completion_states(model: nn.Module, sequences: Sequences) -> Tensor:
    """Return ``(M, H)``: the head's input from which the completion tokens are predicted."""

    def states(sequences: Sequences) -> tuple[Tensor]:
        found: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            found.append(hidden.flatten(0, 1).index_select(0, _predictors(sequences)))
            return hidden[:1, :0]  # Zero rows, so that the head costs nothing.

        with _head_input(model, keep):
            _forward(model, sequences)
        return (found[0],)

    return forward_apart(model, base_model(model), sequences, states)[0]


def hidden_width(model: nn.Module) -> int:
    """Return H, the number of elements of a hidden state that reaches the language-model head."""
    sequences = pad_sequences([((0,), (0,))], 0).to(next(model.parameters()).device)
    with eval_mode(model), torch.no_grad():
        return completion_states(model, sequences).shape[-1]


def can_defer(model: nn.Module) -> bool:
    """Return whether logits can be computed later from hidden states, as from a head that is a plain matrix.

    With an adapter on the head, logits follow from the adapter's state too, which may have changed by then.
    """
    return isinstance(_head(model), nn.Linear)


def deferred_logits(model: nn.Module, states: Tensor, max_logits: int | None) -> DeferredLogits:
    """Return logits that the model's head computes on demand.

    Args:
        model: Model for which :func:`can_defer` is true.
        states: ``(M, H)`` hidden states.
        max_logits: Largest number of logits that exist at a time; ``None`` for no limit.
    """
    vocab_size = _head(model).weight.shape[0]
    rows = len(states) if max_logits is None else max_logits // vocab_size
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
    """Compute the next-token logits that predict the completion tokens.

    Args:
        model: Hugging Face causal language model.
        sequences: ``N`` sequences with ``M`` completion tokens in total.
        completion_only: Run the head for these tokens alone, instead of for prompt and padding too.
        max_logits: Largest number of the head's logits that exist at a time; ``None`` for no limit. It needs
            ``completion_only``.

    Returns:
        ``(M, V)`` in the model's dtype, sequence after sequence; deferred if they are more than ``max_logits``. They
        equal those of each sequence alone: where a batch would change them, it is forwarded in parts.
    """
    if _defers(model, sequences, completion_only, max_logits):
        return deferred_logits(model, completion_states(model, sequences), max_logits)

    def logits(sequences: Sequences) -> tuple[Tensor]:
        rows = _predictors(sequences)
        if not completion_only:
            return (_forward(model, sequences).flatten(0, 1).index_select(0, rows),)
        with _head_input(model, lambda hidden: hidden.flatten(0, 1).index_select(0, rows).unsqueeze(0)):
            return (_forward(model, sequences).squeeze(0),)

    return forward_apart(model, base_model(model), sequences, logits)[0]


def completion_logits_and_states(
    model: nn.Module, sequences: Sequences, *, completion_only: bool = True, max_logits: int | None = None
) -> tuple[Logits, Tensor]:
    """Return the logits of :func:`completion_logits`, and the hidden states that the head computes them from.

    Args:
        model: Hugging Face causal language model.
        sequences: ``N`` sequences with ``M`` completion tokens in total.
        completion_only: Run the head for these tokens alone, instead of for prompt and padding too.
        max_logits: Largest number of the head's logits that exist at a time; ``None`` for no limit.

    Returns:
        ``(M, V)`` logits and ``(M, H)`` states of one forward pass. The first state of a sequence is that of the last
        token of its prompt.
    """
    if _defers(model, sequences, completion_only, max_logits):
        states = completion_states(model, sequences)
        return deferred_logits(model, states, max_logits), states

    def outputs(sequences: Sequences) -> tuple[Tensor, Tensor]:
        rows, found = _predictors(sequences), list[Tensor]()

        def keep(hidden: Tensor) -> Tensor:
            found.append(hidden.flatten(0, 1).index_select(0, rows))
            return found[0].unsqueeze(0) if completion_only else hidden

        with _head_input(model, keep):
            logits = _forward(model, sequences)
        return logits.squeeze(0) if completion_only else logits.flatten(0, 1).index_select(0, rows), found[0]

    logits, states = forward_apart(model, base_model(model), sequences, outputs)
    return logits, states


def _defers(model: nn.Module, sequences: Sequences, completion_only: bool, max_logits: int | None) -> bool:
    """Return whether the logits of sequences are so many that they are computed later."""
    if not completion_only or max_logits is None or not can_defer(model):
        return False
    return bool(len(sequences.completion_index) * _head(model).weight.shape[0] > max_logits)
