"""Alignment metrics as torchmetrics: exact for any batch size, accumulation and number of processes."""

from spo.metrics.sums import SumsAndCounts

__all__ = ["SumsAndCounts"]
