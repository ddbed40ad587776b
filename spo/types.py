"""The shared vocabulary: what flows between data, models, losses and metrics, with shapes.

Symbols used in every shape comment: ``B`` pairs, ``N`` sequences (``2B`` when a batch holds both completions of
each pair), ``T`` padded tokens, ``M`` completion tokens of a batch laid end to end, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


class _Movable:
    """Gives a dataclass of tensors a ``to``, which is all that Lightning needs to move it between devices."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        def move(value: Any) -> Any:
            if isinstance(value, (Tensor, _Movable)):
                return value.to(*args, **kwargs)
            return [move(item) for item in value] if isinstance(value, list) else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[type-var]


@dataclass(frozen=True)
class PairLogps(_Movable):
    """Summed log-probabilities of the two completions of ``B`` pairs, which is all that a preference loss sees.

    Attributes:
        policy_chosen: ``(B,)`` log pi(y_w|x) in nats, summed over completion tokens.
        policy_rejected: ``(B,)`` log pi(y_l|x); ``None`` only for methods that need completions alone (SFT).
        reference_chosen: ``(B,)`` log pi_ref(y_w|x), or ``None`` where no reference is used.
        reference_rejected: ``(B,)`` log pi_ref(y_l|x), or ``None``.
        chosen_length: ``(B,)`` completion tokens of y_w, end-of-text included.
        rejected_length: ``(B,)`` completion tokens of y_l.
        preference: ``(B,)`` probability that chosen is the better one; ``None`` means 1.
        weight: ``(B,)`` non-negative weight of each pair; ``None`` means 1.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor | None = None
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    chosen_length: Tensor | None = None
    rejected_length: Tensor | None = None
    preference: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class ListLogps(_Movable):
    """Summed log-probabilities of ``n`` completions per prompt, for best-of-n and ranked data.

    Attributes:
        policy: ``(B, n)`` log pi(y_i|x).
        mask: ``(B, n)`` true where a completion exists.
        order: ``(B, n)`` indices into the completions, best first.
        reference: ``(B, n)`` log pi_ref(y_i|x), or ``None``.
        weight: ``(B,)`` weight of each list; ``None`` means 1.
    """

    policy: Tensor
    mask: Tensor
    order: Tensor
    reference: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class Sequences(_Movable):
    """``N`` right-padded token sequences, each a prompt followed by a completion.

    Masks follow from lengths, that is from positions: token values never decide what is prompt, completion or
    padding, so the ids of BOS, EOS and PAD may coincide.

    Attributes:
        input_ids: ``(N, T)`` token ids, right-padded.
        prompt_length: ``(N,)`` prompt tokens, at least 1 (a first token has no context to be predicted from).
        length: ``(N,)`` prompt plus completion tokens.
        completion_index: ``(M,)`` completion tokens as positions in the flattened ``(N * T,)`` ids; derived from the
            lengths when absent. Made where the lengths are still on the host, it spares the device a sync per step.
    """

    input_ids: Tensor
    prompt_length: Tensor
    length: Tensor
    completion_index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.completion_index is None:
            object.__setattr__(self, "completion_index", self.completion_mask.flatten().nonzero().squeeze(-1))

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def _positions(self) -> Tensor:
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device)[None, :]

    @property
    def attention_mask(self) -> Tensor:
        """``(N, T)`` true on real tokens."""
        return self._positions() < self.length[:, None]

    @property
    def completion_mask(self) -> Tensor:
        """``(N, T)`` true on completion tokens."""
        return (self._positions() >= self.prompt_length[:, None]) & self.attention_mask

    @property
    def completion_length(self) -> Tensor:
        """``(N,)`` completion tokens."""
        return self.length - self.prompt_length

    def rows(self, index: slice | Tensor) -> Sequences:
        """The chosen rows, cut to the longest of them (on an accelerator this waits for the device)."""
        length = self.length[index]
        return Sequences(self.input_ids[index, : int(length.max())], self.prompt_length[index], length)


@dataclass(frozen=True)
class PreferenceBatch(_Movable):
    """``B`` preference pairs as tokens.

    Attributes:
        sequences: ``2B`` sequences, the ``B`` chosen ones first; only the ``B`` chosen ones where a method needs
            completions alone.
        index: ``(B,)`` position of each pair in its split, so that a metric can tell duplicates.
        preference: ``(B,)`` probability that chosen is better, or ``None`` for 1.
        weight: ``(B,)`` pair weights, or ``None`` for 1.
        reference_logps: ``(2B,)`` precomputed summed reference log-probs in the order of ``sequences``, or ``None``.
    """

    sequences: Sequences
    index: Tensor
    preference: Tensor | None = None
    weight: Tensor | None = None
    reference_logps: Tensor | None = None

    def __len__(self) -> int:
        return self.index.shape[0]

    def pair_logps(self, policy_logps: Tensor, reference_logps: Tensor | None) -> PairLogps:
        """What a loss sees, from the ``(2B,)`` summed log-probs of ``sequences`` under policy and reference."""
        pairs, length = len(self), self.sequences.completion_length
        paired = len(self.sequences) == 2 * pairs
        return PairLogps(
            policy_chosen=policy_logps[:pairs],
            policy_rejected=policy_logps[pairs:] if paired else None,
            reference_chosen=None if reference_logps is None else reference_logps[:pairs],
            reference_rejected=reference_logps[pairs:] if paired and reference_logps is not None else None,
            chosen_length=length[:pairs],
            rejected_length=length[pairs:] if paired else None,
            preference=self.preference,
            weight=self.weight,
        )


@dataclass(frozen=True)
class Window(_Movable):
    """The pairs of one optimiser step on this rank, cut into micro-batches.

    Attributes:
        micro_batches: forwarded one after the other; their gradients add up.
        num_pairs: pairs of this optimiser step over *all* ranks, the denominator of the loss.
    """

    micro_batches: list[PreferenceBatch]
    num_pairs: int

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return iter(self.micro_batches)
