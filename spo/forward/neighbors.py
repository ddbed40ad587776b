"""Decides which sequences share a forward pass, so that no sequence changes the numbers of another.

The value of a sequence is that of a plain forward pass over it alone. Most models compute the same in any batch. Some
do not. LongRoPE and dynamic NTK scale positions by the longest sequence of a batch, and others do not mask padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from spo.errors import UserError
from spo.forward.packing import pack
from spo.forward.sharding import needs_all_processes
from spo.notes import note
from spo.types import Sequences

Scale = tuple[int, ...]
"""Lengths that scale the rotary positions of a sequence. Sequences of equal scales may share a batch."""


class Company(IntEnum):
    """Rows beside which a model computes for a row what it does for the row alone."""

    NONE = 0
    EQUAL_LENGTHS = 1
    ANY = 2

    def key(self, row: int, length: int, scale: object) -> object:
        """Return the key that rows of one batch share, for a row of ``length`` tokens with positions of ``scale``."""
        return {Company.NONE: row, Company.EQUAL_LENGTHS: length, Company.ANY: scale}[self]


def company_of(causal: Any) -> Company:
    """Return the rows that may be scored in one batch; any rows for a model without a probe.

    Args:
        causal: Model without its adapter; :func:`spo.forward.probe.probe_company` sets the attribute.
    """
    return getattr(causal, "company", Company.ANY)


def rope_thresholds(config: Any) -> list[tuple[bool, int]]:
    """Return the lengths in tokens beyond which rotary positions depend on the longest sequence of a batch.

    Args:
        config: Configuration of a model.

    Returns:
        For each scaling whether every length beyond its threshold has a scale of its own (dynamic NTK), or all of
        them share one (LongRoPE); and the threshold.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    found = []
    # Models whose layers differ have parameters for each type of layer.
    for parameters in [given, *(value for value in given.values() if isinstance(value, dict))]:
        kind = str(parameters.get("rope_type") or parameters.get("type"))
        original = parameters.get("original_max_position_embeddings")
        if "dynamic" in kind:
            found.append((True, text.max_position_embeddings))
        elif kind in ("longrope", "su") or "long_mscale" in parameters:
            found.append((False, original or text.original_max_position_embeddings))
    return found


def scale_of(causal: Any) -> Callable[[int], Scale] | None:
    """Return the function from the length of a sequence to its scale, or ``None`` if every length has the same one.

    A model whose positions would remember earlier sequences is changed to forget them.

    Args:
        causal: Model without its adapter.
    """
    thresholds = rope_thresholds(getattr(causal, "config", None))
    if not thresholds:
        return None
    if any(grows for grows, _ in thresholds):
        forget_lengths(causal)

    def scale(length: int) -> Scale:
        return tuple(max(length, limit) if grows else int(length > limit) for grows, limit in thresholds)

    return scale


def alike(rows: Sequence[int], key: Callable[[int], Any]) -> list[list[int]]:
    """Return rows in groups with equal keys, in the order in which the keys appear."""
    groups: dict[Any, list[int]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def groups_to_score(causal: Any, lengths: Callable[[], list[int]]) -> list[list[int]] | None:
    """Return the rows of each forward pass that scores right-padded sequences; ``None`` for all rows in any case.

    Args:
        causal: Model without its adapter.
        lengths: Function to the length of each row. Reading lengths waits for the device, so it is called if needed.
    """
    company, scale = company_of(causal), scale_of(causal)
    if company is Company.ANY and scale is None:
        return None
    tokens = lengths()
    return alike(range(len(tokens)), lambda row: company.key(row, tokens[row], scale and scale(tokens[row])))


def forward_apart(
    model: nn.Module, causal: Any, sequences: Sequences, forward: Callable[[Sequences], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Forward the sequences in groups that do not change each other, and concatenate what belongs to their tokens.

    Args:
        model: Model to run.
        causal: The same model without its adapter.
        sequences: ``N`` sequences with ``M`` completion tokens, padded or packed.
        forward: Function from some of the sequences to ``(m, ...)`` numbers of their completion tokens.

    Returns:
        ``(M, ...)`` for each of the numbers, sequence after sequence.

    Raises:
        UserError: The weights are sharded, and this process needs several forward passes where another may need one.
    """
    groups = groups_to_score(causal, sequences.length.tolist)
    if groups is None:
        return forward(sequences)
    if len(groups) > 1:
        refuse_if_sharded(model, causal)
        note_once(
            causal,
            "sequences_run_alone",
            "sequences of different lengths are forwarded apart: beside a longer one, log-probs would change",
        )
    parts: dict[int, tuple[Tensor, ...]] = {}
    for rows in groups:
        outputs = forward(_subset(sequences, rows))
        lengths = sequences.completion_length[torch.tensor(rows, device=sequences.length.device)].tolist()
        parts |= zip(rows, zip(*(numbers.split(lengths) for numbers in outputs), strict=True), strict=True)
    return tuple(torch.cat(of_rows) for of_rows in zip(*(parts[row] for row in range(len(sequences))), strict=True))


def _subset(sequences: Sequences, rows: list[int]) -> Sequences:
    """Return some of the sequences, cut to the longest of them, in the layout of the whole."""
    device = sequences.input_ids.device
    chosen = sequences.rows(torch.tensor(rows, device=device))
    if sequences.packed is None:
        return chosen
    shared = any(len(group.completions) > 1 for group in sequences.packed.groups.members)
    return pack(chosen.to("cpu"), share_prompts=shared).to(device)


def refuse_if_sharded(model: nn.Module, causal: Any) -> None:
    """Raise an error for a sharded model, each forward pass of which needs all processes.

    Raises:
        UserError: The weights are sharded.
    """
    if needs_all_processes(model):
        raise UserError(
            f"strategy=fsdp: a {type(causal).__name__} has to run sequences of different lengths apart, and processes "
            "with sharded weights cannot; use strategy=ddp, or shorter sequences with data.max_length"
        )


def note_once(causal: Any, key: str, sentence: str) -> None:
    """Write a note about a model, once for each loaded model."""
    noted: set[str] = vars(causal).setdefault("_noted", set())
    if key not in noted:
        noted.add(key)
        note(key, f"{type(causal).__name__}: {sentence}")


# --- rotary positions that remember the longest sequence ----------------------------------------------------------


def forget_lengths(causal: Any) -> None:
    """Let rotary positions of dynamic NTK follow from the current batch alone.

    transformers keeps the scale of the longest sequence so far, with which it would compute the next shorter one.

    Args:
        causal: Model without its adapter. Nothing happens if it was changed before.
    """
    if vars(causal).setdefault("forgets_lengths", False):
        return
    causal.forgets_lengths = True
    for module in causal.modules():
        if _dynamic_prefixes(module):
            module.register_forward_pre_hook(_forget)


def _dynamic_prefixes(module: Any) -> list[str]:
    """Return the prefixes of the buffers of a rotary embedding that dynamic NTK changes; none for other modules."""
    kinds = getattr(module, "rope_type", None)
    by_prefix = {f"{layer}_": kind for layer, kind in kinds.items()} if isinstance(kinds, dict) else {"": kinds}
    return [prefix for prefix, kind in by_prefix.items() if "dynamic" in str(kind)]


def _forget(module: Any, _: Any) -> None:
    """Restore the frequencies and the length that a rotary embedding had when it was made."""
    for prefix in _dynamic_prefixes(module):
        original = getattr(module, f"{prefix}original_inv_freq").to(getattr(module, f"{prefix}inv_freq").device)
        module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
