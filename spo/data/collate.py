"""Collation of tokenized pairs into padded tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spo.data.logps_store import sequence_key
from spo.data.rendering import TokenizedPair
from spo.types import PreferenceBatch, Sequences, pad_sequences


def collate(
    pairs: Sequence[TokenizedPair],
    indices: Sequence[int],
    pad_token_id: int,
    reference_logps: Tensor | None = None,
    arrange: Callable[[Sequences], Sequences] = lambda sequences: sequences,
) -> PreferenceBatch:
    """Collate ``B`` pairs or lists into one batch, in which each of the ``N`` distinct sequences appears once.

    The best completions of all pairs come first, then the second ones, and so on.

    Args:
        pairs: Pairs of this batch, all with or all without a rejected completion.
        indices: Position of each pair in its split.
        pad_token_id: Token that fills the right end of a row; no mask depends on it.
        reference_logps: ``(P, n)`` summed reference log-probs of all ``P`` pairs of the split: first the completions,
            the best one first, and then the further completions, in the order of ``extra``.
        arrange: Function that lays the sequences out for the forward pass, such as packing.

    Returns:
        Batch of ``N`` sequences, with ``(n, B)`` positions of the completions among them; -1 where a list is shorter.

    Raises:
        ValueError: If only some of the pairs have a rejected completion.
    """
    lists = [pair.completions for pair in pairs]
    size = max(map(len, lists))
    if min(map(len, lists)) < min(size, 2):
        raise ValueError("a batch needs a rejected completion in all of its pairs, or in none")
    # Position of each distinct sequence in the batch. A pair of a prompt may repeat a completion of another pair.
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    completions = [
        [
            seen.setdefault((pair.prompt_ids, ranked[rank]), len(seen)) if rank < len(ranked) else -1
            for pair, ranked in zip(pairs, lists, strict=True)
        ]
        for rank in range(size)
    ]
    extra = {
        name: [seen.setdefault((pair.prompt_ids, pair.extra[name]), len(seen)) for pair in pairs]
        for name in pairs[0].extra
    }
    index = torch.tensor(list(indices))
    return PreferenceBatch(
        sequences=arrange(pad_sequences(list(seen), pad_token_id)),
        index=index,
        preference=_column([pair.preference for pair in pairs]),
        weight=_column([pair.weight for pair in pairs]),
        reference_logps=None
        if reference_logps is None
        else _per_sequence(reference_logps[index].T, completions, list(extra.values())),
        completions=torch.tensor(completions),
        keys=[sequence_key(*row) for row in seen],
        label=None if pairs[0].label is None else torch.tensor([float(pair.label) for pair in pairs]),  # type: ignore[arg-type]
        features={
            **{name: torch.tensor([pair.features[name] for pair in pairs]) for name in pairs[0].features},
            # Lists of different lengths end in 0, which the mask shows.
            **{
                name: torch.tensor([(*pair.numbers[name], *[0.0] * (size - len(pair.numbers[name]))) for pair in pairs])
                for name in pairs[0].numbers
            },
        },
        extra={name: torch.tensor(places) for name, places in extra.items()},
    )


def _per_sequence(values: Tensor, completions: list[list[int]], extra: list[list[int]]) -> Tensor:
    """Return ``(N,)`` values of distinct sequences from ``(n, B)`` values of completions, the further ones last."""
    # The longest list of the split may not be in this batch.
    values = torch.cat([values[: len(completions)], values[len(values) - len(extra) :]])
    first: dict[int, int] = {}
    completions = completions + extra
    for position, sequence in enumerate(sequence for rank in completions for sequence in rank):
        if sequence >= 0:
            first.setdefault(sequence, position)
    # Sequences are numbered in the order of their first completions, so no sorting is needed.
    return values.flatten()[list(first.values())]


def _column(values: list[float | None]) -> Tensor | None:
    # Losses read None as 1 for each pair of the batch.
    if all(value is None for value in values):
        return None
    return torch.tensor([1.0 if value is None else value for value in values])
