"""The data that flows between data sets, models, losses and metrics, with shapes.

Symbols used in every shape comment: ``B`` pairs or lists, ``n`` completions of the longest list (2 for pairs), ``N``
sequences, ``T`` padded tokens, ``M`` completion tokens of a batch laid end to end, ``V`` vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spo.forward.packing import Packed

# The default of a field that is missing only until __post_init__ derives it: its type does not include None.
_DERIVED: Any = None


def long_tensor(values: list[int]) -> Tensor:
    """Return integers as a 1-D int64 tensor; much faster than ``torch.tensor`` for long lists."""
    # PyTorch converts a list element by element, but it shares the memory of an array. An empty buffer is an error.
    return torch.frombuffer(array("q", values), dtype=torch.long) if values else torch.empty(0, dtype=torch.long)


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the host to ``device`` without blocking the host."""
    if device.type != "cuda":
        return tensor.to(device)
    # Only copies from pinned memory are asynchronous.
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Movable:
    """A dataclass whose tensors move to a device together; nested ``Movable`` fields and lists of them move too.

    Every other field stays on the host.
    """

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return a copy in which ``Tensor.to`` was applied to each tensor."""
        return self._map(lambda value: value.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """Return a copy in page-locked host memory. Data loaders call a method of this name."""
        return self._map(lambda value: value.pin_memory())

    def to_device_async(self, device: torch.device) -> Self:
        """Copy from the host to ``device`` without blocking the host."""

        def copied(value: Any) -> Any:
            return copy_async(value, device) if isinstance(value, Tensor) else value.to_device_async(device)

        return self._map(copied)

    def _map(self, change: Callable[[Any], Any]) -> Self:
        """Return a copy in which ``change`` was applied to each tensor and each ``Movable``."""

        def changed(value: Any) -> Any:
            if isinstance(value, (Tensor, Movable)):
                return change(value)
            return [changed(item) for item in value] if isinstance(value, list) else value

        return replace(self, **{f.name: changed(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class PairLogps(Movable):
    """Summed log-probabilities of the two completions of ``B`` pairs, the input of a preference loss.

    Attributes:
        policy_chosen: ``(B,)`` log pi(y_w|x) in nats, summed over completion tokens.
        policy_rejected: ``(B,)`` log pi(y_l|x); ``None`` only for methods that need completions alone (SFT).
        reference_chosen: ``(B,)`` log pi_ref(y_w|x), or ``None`` without a reference.
        reference_rejected: ``(B,)`` log pi_ref(y_l|x), or ``None``.
        chosen_length: ``(B,)`` number of completion tokens of y_w, end-of-text included.
        rejected_length: ``(B,)`` number of completion tokens of y_l, end-of-text included.
        preference: ``(B,)`` probability that chosen is better; ``None`` for 1.
        weight: ``(B,)`` non-negative weight of each pair; ``None`` for 1.
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
class ListLogps(Movable):
    """Summed log-probabilities of ``n`` completions of ``B`` prompts, for best-of-n and ranked data.

    Attributes:
        policy: ``(B, n)`` log pi(y_i|x).
        mask: ``(B, n)`` true where a completion exists.
        order: ``(B, n)`` indices into the completions, best first.
        reference: ``(B, n)`` log pi_ref(y_i|x), or ``None``.
        weight: ``(B,)`` non-negative weight of each list; ``None`` for 1.
        preference: ``(B,)`` probability that ``order`` is right and not its reverse; ``None`` for 1. For a list of two
            it is the soft label of a pair.
    """

    policy: Tensor
    mask: Tensor
    order: Tensor
    reference: Tensor | None = None
    weight: Tensor | None = None
    preference: Tensor | None = None

    def best_first(self) -> ListLogps:
        """Return the lists with their completions in order: the best first, missing ones last and 0."""
        exists = self.mask.gather(-1, self.order)
        order = self.order.gather(-1, exists.long().argsort(dim=-1, descending=True, stable=True))
        mask = self.mask.gather(-1, order)

        def arranged(logps: Tensor) -> Tensor:
            return logps.gather(-1, order).masked_fill(~mask, 0)

        positions = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        reference = None if self.reference is None else arranged(self.reference)
        return replace(self, policy=arranged(self.policy), mask=mask, order=positions, reference=reference)


@dataclass(frozen=True)
class Sequences(Movable):
    """``N`` right-padded token sequences, each a prompt followed by a completion.

    Masks follow from lengths. Token values never decide what is prompt, completion or padding, so the ids of BOS, EOS
    and PAD may coincide.

    Attributes:
        input_ids: ``(N, T)`` token ids, right-padded.
        prompt_length: ``(N,)`` number of prompt tokens, at least 1: nothing predicts a first token.
        length: ``(N,)`` number of prompt and completion tokens.
        completion_index: ``(M,)`` positions of the completion tokens in the flattened ``(N * T,)`` ids. It is derived
            from the lengths, preferably on the host: on a device that takes a sync per step.
        packed: The same sequences as one row without padding, or ``None``; see :func:`spo.forward.packing.pack`.
    """

    input_ids: Tensor
    prompt_length: Tensor
    length: Tensor
    completion_index: Tensor = _DERIVED
    packed: Packed | None = None

    def __post_init__(self) -> None:
        if self.completion_index is None:
            object.__setattr__(self, "completion_index", self.completion_mask.flatten().nonzero().squeeze(-1))

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.input_ids.shape[0]

    def _positions(self) -> Tensor:
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device)[None, :]

    @property
    def attention_mask(self) -> Tensor:
        """Return ``(N, T)``, true on tokens and false on padding."""
        return self._positions() < self.length[:, None]

    @property
    def completion_mask(self) -> Tensor:
        """Return ``(N, T)``, true on completion tokens."""
        return (self._positions() >= self.prompt_length[:, None]) & self.attention_mask

    @property
    def completion_length(self) -> Tensor:
        """Return the ``(N,)`` number of completion tokens of each sequence."""
        return self.length - self.prompt_length

    @property
    def last_token(self) -> Tensor:
        """Return the ``(N,)`` id of the last token of each sequence."""
        return self.input_ids.gather(1, self.length[:, None] - 1).squeeze(1)

    def completions(self) -> list[list[int]]:
        """Return the token ids of each completion as lists on the host."""
        spans = zip(self.input_ids.tolist(), self.prompt_length.tolist(), self.length.tolist(), strict=True)
        return [ids[start:end] for ids, start, end in spans]

    def rows(self, index: slice | Tensor) -> Sequences:
        """Return some of the rows, cut to the longest of them; on an accelerator this waits for the device."""
        length = self.length[index]
        return Sequences(self.input_ids[index, : int(length.max())], self.prompt_length[index], length)


def pad_sequences(rows: SequenceABC[tuple[SequenceABC[int], SequenceABC[int]]], pad_token_id: int) -> Sequences:
    """Return prompts with their completions as right-padded sequences.

    Args:
        rows: Token ids of the prompt and of the completion of each sequence.
        pad_token_id: Token id that fills the right end.
    """
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    width = max(lengths)
    ids: list[int] = []
    for length, (prompt, completion) in zip(lengths, rows, strict=True):
        ids += [*prompt, *completion, *[pad_token_id] * (width - length)]
    prompt_length = torch.tensor([len(prompt) for prompt, _ in rows])
    return Sequences(long_tensor(ids).view(len(rows), width), prompt_length, torch.tensor(lengths))


def pad_prompts(
    prompts: SequenceABC[SequenceABC[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ``(N, T)`` token ids of prompts to continue, padded on the left, and their attention mask."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


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
    """

    sequences: Sequences
    index: Tensor
    preference: Tensor | None = None
    weight: Tensor | None = None
    reference_logps: Tensor | None = None
    completions: Tensor | None = None
    keys: list[bytes] | None = None

    def __len__(self) -> int:
        """Return the number of pairs or lists."""
        return self.index.shape[0]

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

    def pair_logps(self, policy_logps: Tensor, reference_logps: Tensor | None) -> PairLogps:
        """Return the input of a loss of pairs; of a longer list, the pair is its best two completions.

        Args:
            policy_logps: ``(N,)`` summed log-probs of ``sequences`` under the policy.
            reference_logps: ``(N,)`` summed log-probs of ``sequences`` under the reference, or ``None``.
        """

        def sides(values: Tensor | None) -> tuple[Any, Any]:
            if values is None:
                return None, None
            chosen, *others = self.per_completion(values)
            return chosen, others[0] if others else None

        policy, reference = sides(policy_logps), sides(reference_logps)
        length = sides(self.sequences.completion_length)
        return PairLogps(*policy, *reference, *length, self.preference, self.weight)

    def list_logps(self, policy_logps: Tensor, reference_logps: Tensor | None) -> ListLogps:
        """Return the input of a loss of lists; a pair is a list of two.

        Args:
            policy_logps: ``(N,)`` summed log-probs of ``sequences`` under the policy.
            reference_logps: ``(N,)`` summed log-probs of ``sequences`` under the reference, or ``None``.
        """
        policy, mask = self.per_completion(policy_logps).T, self.mask().T
        return ListLogps(
            policy=policy,
            mask=mask,
            order=torch.arange(mask.shape[1], device=mask.device).expand_as(mask),
            reference=None if reference_logps is None else self.per_completion(reference_logps).T,
            weight=self.weight,
            preference=self.preference,
        )


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
