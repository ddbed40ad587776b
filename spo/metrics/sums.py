"""Means over pairs, kept as sums and counts so that they are reduced once."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class SumsAndCounts(Metric):
    """The mean of several named quantities, each over its own number of elements.

    A mean of batch means is biased by a short last batch; here every element counts once, on whatever rank and in
    whatever batch it was seen. Sums are float64.

    Args:
        names: the quantities.
        over_ranks: false where one process computes alone.
    """

    full_state_update = False

    def __init__(self, names: tuple[str, ...], over_ranks: bool = True) -> None:
        super().__init__(sync_on_compute=over_ranks)
        self.names = names
        # persistent: a run resumed between two log steps reports the mean over the whole interval
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), "sum", persistent=True)
        self.add_state("counts", torch.zeros(len(names), dtype=torch.float64), "sum", persistent=True)

    def update(self, values: dict[str, Tensor | float]) -> None:
        """Adds the elements of each given quantity: a tensor of any shape, or a number."""
        for name, value in values.items():
            position = self.names.index(name)
            is_tensor = isinstance(value, Tensor)
            self.sums[position] += value.detach().double().sum() if is_tensor else value
            self.counts[position] += value.numel() if is_tensor else 1

    def compute(self) -> dict[str, float]:
        """The means of all quantities that were seen at least once."""
        sums, counts = self.sums.tolist(), self.counts.tolist()
        return {name: total / count for name, total, count in zip(self.names, sums, counts, strict=True) if count > 0}
