"""Batches of preference data as tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from spo.types.movable import Movable
from spo.types.sequences import Sequences

_BY_PAIR = ("index", "preference", "weight", "label")


@dataclass(frozen=True)
class PreferenceBatch(Movable):
    """``B`` preference pairs or ranked lists as tokens, with each distinct sequence once.

    Attributes:
        sequences: ``N`` distinct sequences of the batch.
        index: ``(B,)`` position of each pair in its split, by which a metric recognizes duplicates.
        preference: ``(B,)`` probability that chosen is better, or ``None`` for 1.
        weight: ``(B,)`` weight of each pair, or ``None`` for 1.
        reference_logps: ``(N,)`` precomputed summed reference log-probs of ``sequences``, or ``None``.
        completions: ``(n, B)`` index in ``sequences`` of each completion, best first, and -1 where a list has fewer
            than ``n``; ``None`` if ``sequences`` holds all ``n * B``, first the ``B`` best ones, and so on.
        keys: Digest of each of the ``N`` sequences, the key of its stored log-probs; they stay on the host.
        label: ``(B,)`` probability that a completion without a partner is desirable, or ``None`` for other data.
        features: ``(B, ...)`` numbers of the rows, by name.
        extra: ``(B,)`` index in ``sequences`` of each further completion, by name.
    """

    sequences: Sequences
    index: Tensor
    preference: Tensor | None = None
    weight: Tensor | None = None
    reference_logps: Tensor | None = None
    completions: Tensor | None = None
    keys: list[bytes] | None = None
    label: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of pairs or lists."""
        return self.index.shape[0]

    def without_pairs(self) -> PreferenceBatch:
        """Return a batch of the same sequences that belong to no pair: it is computed and does not count."""
        columns = {one.name: getattr(self, one.name) for one in fields(self)}
        none: dict[str, Any] = {name: columns[name][:0] for name in _BY_PAIR if columns[name] is not None}
        for name in ("features", "extra"):
            none[name] = {key: value[:0] for key, value in columns[name].items()}
        return replace(self, completions=self._sequence_of()[:, :0], **none)

    def _sequence_of(self) -> Tensor:
        """Return the ``(n, B)`` index in ``sequences`` of each completion, -1 for a missing one."""
        if self.completions is not None:
            return self.completions
        return torch.arange(len(self.sequences), device=self.index.device).view(-1, len(self))

    def mask(self) -> Tensor:
        """Return ``(n, B)``, true where a completion exists."""
        return self._sequence_of() >= 0

    def per_completion(self, values: Tensor) -> Tensor:
        """Return ``(N,)`` values of ``sequences`` as ``(n, B)``, best completions first; 0 for a missing one."""
        return values[self._sequence_of().clamp(min=0)].masked_fill(~self.mask(), 0)

    def mean_per_pair(self, values: Tensor) -> Tensor:
        """Return the ``(B,)`` mean over each pair or list of ``(N,)`` values of ``sequences``."""
        return self.per_completion(values).sum(0) / self.mask().sum(0)


@dataclass(frozen=True)
class Window(Movable):
    """The pairs of one optimizer step on this rank, cut into micro-batches.

    Attributes:
        micro_batches: Batches that are forwarded one after the other; their gradients add up.
        num_pairs: Number of pairs of this optimizer step over *all* ranks, the denominator of the loss.
    """

    micro_batches: list[PreferenceBatch]
    num_pairs: int

    def __iter__(self) -> Iterator[PreferenceBatch]:
        """Iterate over the micro-batches."""
        return iter(self.micro_batches)
