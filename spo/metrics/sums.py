"""Means over pairs, kept as sums and counts so that they are reduced once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SumsAndCounts(Metric):
    """The mean of several named quantities, each over its own number of elements.

    A mean of batch means is biased by a short last batch; here every element counts once, on whatever rank and in
    whatever batch it was seen. Sums are float64. An update only keeps what it is given, so that a step pays nothing for
    it; it is added up when someone looks.

    Args:
        names: the quantities.
        over_ranks: false where one process computes alone.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, names: tuple[str, ...], over_ranks: bool = True) -> None:
        super().__init__(sync_on_compute=over_ranks)
        self.names = names
        self._given: dict[str, list[Tensor | float]] = {}
        # persistent: a run resumed between two log steps reports the mean over the whole interval
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), "sum", persistent=True)
        self.add_state("counts", torch.zeros(len(names), dtype=torch.float64), "sum", persistent=True)

    def update(self, values: Mapping[str, Tensor | float]) -> None:
        """Adds the elements of each given quantity: a tensor of any shape, or a number."""
        if unknown := values.keys() - set(self.names):
            raise ValueError(f"not among the names of this metric: {', '.join(sorted(unknown))}")
        for name, value in values.items():
            self._given.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)

    def _add_up(self) -> None:
        given, self._given = self._given, {}
        for name, values in given.items():
            position = self.names.index(name)
            tensors = [value.double().flatten() for value in values if isinstance(value, Tensor)]
            numbers = [value for value in values if not isinstance(value, Tensor)]
            self.sums[position] += sum(numbers)
            self.counts[position] += len(numbers) + sum(tensor.numel() for tensor in tensors)
            if tensors:
                self.sums[position] += torch.cat([tensor.to(self.sums.device) for tensor in tensors]).sum()

    def sync_context(self, *args: Any, **kwargs: Any) -> Any:
        """Adds up what the processes are about to share."""
        self._add_up()
        return super().sync_context(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Adds up what is about to be saved."""
        self._add_up()
        return super().state_dict(*args, **kwargs)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._given = {}

    def compute(self) -> dict[str, float]:
        """The means of all quantities that were seen at least once."""
        sums, counts = self.sums.tolist(), self.counts.tolist()
        return {name: total / count for name, total, count in zip(self.names, sums, counts, strict=True) if count > 0}
