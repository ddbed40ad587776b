"""Log-probs of many batches as one input of a loss, for losses in which the pairs of a step depend on each other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from spo.types import ListLogps, Logps


def concat_logps(parts: Sequence[Logps], per_completion: Collection[str] = ()) -> Logps:
    """Return the pairs, lists or completions of several batches as one, in their order.

    Args:
        parts: Log-probs of at least one batch. Lists are filled up to the longest one, which their mask shows.
        per_completion: Names of the features that have a number for each completion.

    Raises:
        ValueError: Only some of the parts have rejected completions, or log-probs of a reference.
    """
    longest = max((part.mask.shape[1] for part in parts if isinstance(part, ListLogps)), default=0)
    parts = [_filled_up(_dense(part), longest, per_completion) for part in parts]
    columns = [part.columns() for part in parts]
    for one in columns:
        if differing := one.keys() ^ columns[0].keys():
            raise ValueError(f"{sorted(differing)[0]} is known for some of the pairs only")
    return parts[0].with_columns({path: torch.cat([one[path] for one in columns]) for path in columns[0]})


def gather_logps(own: Logps, rank: int, world_size: int, per_completion: Collection[str] = ()) -> tuple[Logps, slice]:
    """Return the rows of all processes, and which of them are those of this process.

    Args:
        own: Log-probs of this process. They keep their gradient, and those of other processes do not have one.
        rank: Index of this process.
        world_size: Number of processes, which all call this function.
        per_completion: Names of the features that have a number for each completion.
    """
    own = _dense(own)
    everyone = [own]
    if world_size > 1:
        columns = {path: gather_all_tensors(value.detach().contiguous()) for path, value in own.columns().items()}
        everyone = [own.with_columns({path: values[i] for path, values in columns.items()}) for i in range(world_size)]
        everyone[rank] = own
    sizes = list(map(len, everyone))
    first = sum(sizes[:rank])
    return concat_logps(everyone, per_completion), slice(first, first + sizes[rank])


def leaves_of(logps: Logps) -> tuple[Logps, dict[str, Tensor]]:
    """Return a copy whose numbers come from nowhere, and those of them that gradients of the policy may reach."""
    columns = {path: value.detach() for path, value in logps.columns().items()}
    leaves = {path: columns[path].requires_grad_() for path in columns if logps.is_of_policy(path)}
    return logps.with_columns(columns), leaves


def _dense(logps: Logps) -> Logps:
    """Return the rows with their labels and weights, which may be missing for 1 in some batches only."""
    names = {one.name for one in fields(logps)} & {"preference", "weight"}
    like = next(value for path, value in logps.columns().items() if logps.is_of_policy(path))
    ones = like.new_ones(len(like))
    known = {name: value.to(ones) for name in names if (value := getattr(logps, name)) is not None}
    return logps.with_columns(logps.columns() | dict.fromkeys(names, ones) | known)


def _filled_up(lists: Logps, longest: int, per_completion: Collection[str]) -> Logps:
    if not isinstance(lists, ListLogps):
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
        terms={name: wide(value) for name, value in lists.terms.items()},
        references={name: wide(value) for name, value in lists.references.items()},
        features={name: wide(value) if name in per_completion else value for name, value in lists.features.items()},
    )
