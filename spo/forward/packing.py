"""Packed rows: the sequences of a batch in one row without padding, with each shared prompt once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from torch import Tensor

from spo.types import Movable, Sequences, long_tensor


@dataclass(frozen=True)
class Group:
    """A prompt and its completions, one after the other in a packed row.

    Attributes:
        prompt: Tokens of the prompt.
        completions: Tokens of each completion.
    """

    prompt: int
    completions: tuple[int, ...]

    @property
    def length(self) -> int:
        """Return the number of tokens of the group."""
        return self.prompt + sum(self.completions)


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of a packed row.

    Attributes:
        members: Groups in the order of the row.
        derived: Cache of what attention derives from the groups, such as masks, for the next layers and models.
    """

    members: tuple[Group, ...]
    derived: dict[object, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Packed(Movable):
    """Sequences laid end to end in one row of ``L`` tokens, without padding.

    A completion attends to its prompt and to itself, and to nothing else. Its positions continue those of the prompt.

    Attributes:
        input_ids: ``(1, L)`` token ids.
        position_ids: ``(1, L)`` position of each token in its own sequence.
        predictors: ``(M,)`` index in the row of the token before each completion token, sequence after sequence.
        groups: Lengths of the prompts and completions of the row.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    groups: Groups


def pack(sequences: Sequences, *, share_prompts: bool) -> Sequences:
    """Return the sequences with their packed row.

    The tensors have to be on the host: the layout follows from token ids, and reading them from a device would block.

    Args:
        sequences: ``N`` sequences.
        share_prompts: Put sequences with equal prompts into one group, which holds the prompt once. If false, each
            sequence is a group of its own.
    """
    spans = zip(sequences.input_ids.tolist(), sequences.prompt_length.tolist(), sequences.length.tolist(), strict=True)
    rows = [(tuple(ids[:start]), ids[start:end]) for ids, start, end in spans]
    members: dict[object, list[int]] = {}
    for row, (prompt, _) in enumerate(rows):
        members.setdefault(prompt if share_prompts else row, []).append(row)
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[list[int]] = [[] for _ in rows]
    groups = []
    for indices in members.values():
        prompt = rows[indices[0]][0]
        last_of_prompt = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        for row in indices:
            completion = rows[row][1]
            # The prompt's last token predicts the first token of each completion; then each token predicts the next.
            within = range(len(ids), len(ids) + len(completion) - 1)
            predictors[row] = [last_of_prompt, *within][: len(completion)]
            ids += completion
            positions += range(len(prompt), len(prompt) + len(completion))
        groups.append(Group(len(prompt), tuple(len(rows[row][1]) for row in indices)))
    packed = Packed(
        input_ids=long_tensor(ids)[None],
        position_ids=long_tensor(positions)[None],
        predictors=long_tensor(list(chain.from_iterable(predictors))),
        groups=Groups(tuple(groups)),
    )
    return replace(sequences, packed=packed)
