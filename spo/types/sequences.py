"""Token sequences: a prompt and a completion each, right-padded."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo.types.movable import Movable

if TYPE_CHECKING:
    from spo.forward.packing import Packed

# The default of a field that is missing only until __post_init__ derives it: its type does not include None.
_DERIVED: Any = None


def long_tensor(values: list[int]) -> Tensor:
    """Return integers as a 1-D int64 tensor; much faster than ``torch.tensor`` for long lists."""
    # PyTorch converts a list element by element, but it shares the memory of an array. An empty buffer is an error.
    return torch.frombuffer(array("q", values), dtype=torch.long) if values else torch.empty(0, dtype=torch.long)


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
    def left_aligned_index(self) -> Tensor:
        """Return ``completion_index`` of the same completions moved to the left edge: a column counts their tokens."""
        return self.completion_index - self.prompt_length[self.completion_index // self.input_ids.shape[1]]

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
