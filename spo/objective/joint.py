"""Log-probs of many batches as one input of a loss, for losses in which the pairs of a step depend on each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from spo.types import ListLogps, PairLogps

Logps = PairLogps | ListLogps


def concat_logps(parts: Sequence[Logps]) -> Logps:
    """Return the pairs or lists of several batches as one, in their order.

    Args:
        parts: Log-probs of at least one batch. Lists are filled up to the longest one, which their mask shows.

    Raises:
        ValueError: Only some of the parts have rejected completions, or log-probs of a reference.
    """
    longest = max((part.mask.shape[1] for part in parts if isinstance(part, ListLogps)), default=0)
    parts = [_filled_up(_dense(part), longest) for part in parts]
    columns: dict[str, Any] = {}
    for name in (field.name for field in fields(parts[0])):
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        if values and len(values) < len(parts):
            raise ValueError(f"{name} is known for some of the pairs only")
        columns[name] = torch.cat(values) if values else None
    return replace(parts[0], **columns)


def gather_logps(own: Logps, rank: int, world_size: int) -> tuple[Logps, slice]:
    """Return the pairs or lists of all processes, and which of them are those of this process.

    Args:
        own: Log-probs of this process. They keep their gradient, and those of other processes do not have one.
        rank: Index of this process.
        world_size: Number of processes, which all call this function.
    """
    own = _dense(own)
    everyone = [own]
    if world_size > 1:
        known = {field.name: value for field in fields(own) if (value := getattr(own, field.name)) is not None}
        columns = {name: gather_all_tensors(value.detach().contiguous()) for name, value in known.items()}
        of_rank: list[dict[str, Any]] = [
            {name: values[i] for name, values in columns.items()} for i in range(world_size)
        ]
        everyone = [replace(own, **of_one) for of_one in of_rank]
        everyone[rank] = own
    sizes = [len(cast(Tensor, part.weight)) for part in everyone]
    first = sum(sizes[:rank])
    return concat_logps(everyone), slice(first, first + sizes[rank])


def _dense(logps: Logps) -> Logps:
    """Return the pairs or lists with their labels and weights, which may be missing for 1 in some batches only."""
    policy = logps.policy if isinstance(logps, ListLogps) else logps.policy_chosen
    ones = policy.new_ones(len(policy))
    preference, weight = (ones if value is None else value.to(ones) for value in (logps.preference, logps.weight))
    return replace(logps, preference=preference, weight=weight)


def _filled_up(lists: Logps, longest: int) -> Logps:
    if isinstance(lists, PairLogps):
        return lists
    extra = longest - lists.mask.shape[1]
    columns = torch.arange(longest - extra, longest, device=lists.order.device)

    def wide(values: Tensor) -> Tensor:
        return nn.functional.pad(values, (0, extra))

    return replace(
        lists,
        policy=wide(lists.policy),
        mask=wide(lists.mask),
        order=torch.cat([lists.order, columns.expand(len(lists.order), -1)], dim=1),
        reference=None if lists.reference is None else wide(lists.reference),
    )
