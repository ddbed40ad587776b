"""Intervals that say how much of a number is luck of the prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap_interval(values: Sequence[float], *, confidence: float, samples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Args:
        values: one per independent unit (prompt).
        confidence: such as 0.95.
        samples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        Lower and upper end.
    """
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(data), size=(samples, len(data)))
    low, high = np.quantile(data[drawn].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
