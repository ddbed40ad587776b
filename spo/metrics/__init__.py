"""Alignment metrics: torchmetrics that are exact for any batch size, accumulation and number of processes."""

from spo.metrics.calibration import Calibration
from spo.metrics.repetition import repetition
from spo.metrics.sums import SumsAndCounts

__all__ = ["Calibration", "SumsAndCounts", "repetition"]
