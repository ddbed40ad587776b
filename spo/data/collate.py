"""From tokenised pairs to padded tensors."""

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
    """Pads ``B`` pairs or lists into one batch, in which a sequence that several of them share is there once.

    The best completions come first, then the second ones, and so on.

    Args:
        pairs: the pairs of this batch; all with a rejected completion, or none.
        indices: position of each pair in its split.
        pad_token_id: what fills the right end; no mask depends on it.
        reference_logps: ``(P, n)`` summed reference log-probs of the completions, best first, for the whole split of
            ``P`` pairs, indexed by ``indices``.
        arrange: lays the sequences out for the forward pass.

    Raises:
        ValueError: when only some of the pairs have a rejected completion.
    """
    lists = [pair.completions for pair in pairs]
    size = max(map(len, lists))
    if min(map(len, lists)) < min(size, 2):
        raise ValueError("a batch needs a rejected completion in all of its pairs, or in none")
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    completions = [
        [
            seen.setdefault((pair.prompt_ids, ranked[rank]), len(seen)) if rank < len(ranked) else -1
            for pair, ranked in zip(pairs, lists, strict=True)
        ]
        for rank in range(size)
    ]
    index = torch.tensor(list(indices))
    return PreferenceBatch(
        sequences=arrange(pad_sequences(list(seen), pad_token_id)),
        index=index,
        preference=_column([pair.preference for pair in pairs]),
        weight=_column([pair.weight for pair in pairs]),
        reference_logps=None if reference_logps is None else _per_sequence(reference_logps[index].T, completions),
        completions=torch.tensor(completions),
        keys=[sequence_key(*row) for row in seen],
    )


def _per_sequence(values: Tensor, completions: list[list[int]]) -> Tensor:
    """``(n, B)`` values of completions as ``(N,)``, those of the first place where each distinct sequence is."""
    first: dict[int, int] = {}
    for position, place in enumerate(place for ranks in completions for place in ranks):
        if place >= 0:
            first.setdefault(place, position)
    return values.flatten()[list(first.values())]  # sequences are numbered as they come


def _column(values: list[float | None]) -> Tensor | None:
    if all(value is None for value in values):
        return None
    return torch.tensor([1.0 if value is None else value for value in values])
