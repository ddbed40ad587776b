"""The tokens that end a completion: several ids, any of which the model may draw."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from spo.types import Sequences, copy_async


def is_finished(sequences: Sequences, stop_ids: Seq[int]) -> Tensor:
    """Return ``(N,)``, true where the last token of a completion ends it, and false where the completion was cut.

    Args:
        sequences: ``N`` prompts with their completions.
        stop_ids: Tokens that end a completion.
    """
    return torch.isin(sequences.last_token, copy_async(torch.tensor(stop_ids), sequences.length.device))


def contents(sequences: Sequences, stop_ids: Seq[int]) -> list[list[int]]:
    """Return the token ids of each completion without the token that ends it, as lists on the host.

    Args:
        sequences: ``N`` prompts with their completions.
        stop_ids: Tokens that end a completion.
    """
    finished = is_finished(sequences, stop_ids).tolist()
    return [ids[:-1] if ended else ids for ids, ended in zip(sequences.completions(), finished, strict=True)]
