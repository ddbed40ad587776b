"""Means over elements, kept as sums and counts so that they are reduced once."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from spo.processes import world_size

Group = dict[str, list[Tensor | float]]
"""Updates that can be forgotten together."""


class SumsAndCounts(Metric):
    """Means of several named quantities, each over its own number of elements.

    A mean of batch means is biased by a short last batch. Here every element counts once, on any rank and in any batch.
    Sums are float64. An update only stores its values, so that it costs a step nothing; they are summed on demand.

    Args:
        names: Names of the quantities.
        over_ranks: Whether to reduce over processes; false where one process computes alone.
        gaps: Names of the quantities in which NaN stands for a missing element. In the others it makes the mean NaN.
        of_processes: Names of the quantities that each process measures once where there is one element, such as the
            loss of a step. Together these count as one element, so that a run may resume on other devices.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        names: tuple[str, ...],
        over_ranks: bool = True,
        gaps: Collection[str] = (),
        of_processes: Collection[str] = (),
    ) -> None:
        super().__init__(sync_on_compute=over_ranks)
        self.names, self.gaps, self.of_processes = names, frozenset(gaps), frozenset(of_processes)
        self._stored: list[Group] = [{}]
        # Persistent, so that a run resumed between two log steps reports the mean over the whole interval.
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), "sum", persistent=True)
        self.add_state("counts", torch.zeros(len(names), dtype=torch.float64), "sum", persistent=True)

    def update(self, values: Mapping[str, Tensor | float]) -> None:
        """Add elements.

        Args:
            values: Elements by quantity, each a tensor of any shape or a number.

        Raises:
            ValueError: If a quantity was not named at construction.
        """
        if unknown := values.keys() - set(self.names):
            raise ValueError(f"unknown quantities: {', '.join(sorted(unknown))}")
        for name, value in values.items():
            self._stored[-1].setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)

    def start_group(self) -> Group:
        """Start a group of updates, such as those of a step, and return it."""
        self._stored.append({})
        return self._stored[-1]

    def forget(self, group: Group) -> None:
        """Forget the updates of a group. After they were summed this does nothing."""
        self._stored = [one for one in self._stored if one is not group] or [{}]

    def _sum_stored(self) -> None:
        groups, self._stored = self._stored, [{}]
        # One group after the other, as a run adds them that was saved between two groups and resumes.
        for name, values in (item for group in groups for item in group.items()):
            position, has_gaps = self.names.index(name), name in self.gaps
            tensors = [value.double().flatten() for value in values if isinstance(value, Tensor)]
            numbers = [value for value in values if not isinstance(value, Tensor)]
            if has_gaps:
                numbers = [value for value in numbers if not math.isnan(value)]
            share = 1 / world_size() if name in self.of_processes else 1
            self.sums[position] += sum(numbers) * share
            self.counts[position] += len(numbers) * share
            if tensors:
                elements = torch.cat([tensor.to(self.sums.device) for tensor in tensors])
                missing = elements.isnan() if has_gaps else torch.zeros_like(elements, dtype=torch.bool)
                self.counts[position] += (~missing).sum() * share
                self.sums[position] += elements.masked_fill(missing, 0).sum() * share

    def sync_context(self, *args: Any, **kwargs: Any) -> Any:
        """Sum stored values before processes exchange them."""
        self._sum_stored()
        return super().sync_context(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Sum stored values before they are saved."""
        self._sum_stored()
        return super().state_dict(*args, **kwargs)

    def by_rank(self) -> dict[str, Tensor]:
        """Return the sums and counts of each process as rows. All processes must call it."""
        self._sum_stored()
        found = {"sums": self.sums.clone(), "counts": self.counts.clone()}
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {name: tensor[None] for name, tensor in found.items()}
        rows = {
            name: [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
            for name, tensor in found.items()
        }
        for name, tensor in found.items():
            torch.distributed.all_gather(rows[name], tensor)
        return {name: torch.stack(of_ranks) for name, of_ranks in rows.items()}

    def of_rank(self, rows: Mapping[str, Tensor], rank: int, count: int) -> dict[str, Tensor]:
        """Return what :meth:`by_rank` holds for a process; of another number of processes, the first has all.

        Args:
            rows: Sums and counts of each process.
            rank: Rank of the process.
            count: Number of processes now.
        """
        if len(rows["sums"]) == count:
            return {name: of_ranks[rank] for name, of_ranks in rows.items()}
        return {name: of_ranks.sum(0) * (rank == 0) for name, of_ranks in rows.items()}

    def reset(self) -> None:
        """Clear all sums, counts and stored values."""
        super().reset()
        self._stored = [{}]

    def compute(self) -> dict[str, float]:
        """Return the means of all quantities with at least one element."""
        sums, counts = self.sums.tolist(), self.counts.tolist()
        return {name: total / count for name, total, count in zip(self.names, sums, counts, strict=True) if count > 0}
