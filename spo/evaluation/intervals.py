"""Intervals that say how much of a number is luck of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its interval, which are ``None`` where a single prompt leaves nothing to say."""

    value: float
    low: float | None = None
    high: float | None = None

    def under(self, name: str) -> dict[str, float]:
        """As metrics: ``NAME``, and where there is an interval ``NAME_ci_low`` and ``NAME_ci_high``."""
        ends = {f"{name}_ci_low": self.low, f"{name}_ci_high": self.high}
        return {name: self.value} | {key: end for key, end in ends.items() if end is not None}


class Bootstrap:
    """Bootstrap over prompts: the samples of a prompt are drawn again together.

    Every number of an evaluation uses the same resamples, and a comparison with an opponent is resampled as the pair
    it is: what makes a prompt hard for both sides cancels. Few prompts know little of how much prompts vary: resampled
    deviations are divided by what they may have underestimated it by, ``sqrt(chi2 / (P - 1))``, so that those of a mean
    become Student variables, and cut where resampling itself ends: no interval leaves the range of its statistic.
    That of fewer than six prompts is too short, as the range of ``n`` of them misses their median with ``2^(1 - n)``.
    One prompt gives none.

    Args:
        units: of each sample the prompt it belongs to, or whatever is independent; prompts weigh alike.
        confidence: such as 0.95.
        samples: bootstrap resamples.
        seed: of the resampling.

    Attributes:
        weights: ``(1 + samples, N)`` of the samples: first as they are, then in each resample.
    """

    def __init__(self, units: Sequence[Hashable], *, confidence: float, samples: int, seed: int) -> None:
        names = {name: place for place, name in enumerate(dict.fromkeys(units))}
        place = np.array([names[unit] for unit in units])
        even = np.full(len(names), 1 / len(names))
        generator = np.random.default_rng(seed)
        drawn = generator.multinomial(len(names), even, size=samples)
        counts, sizes = np.vstack([np.ones(len(names)), drawn]), np.bincount(place)
        self.weights: Array = counts[:, place] * (sizes.max() / sizes[place])
        self.confidence = confidence
        self._single = len(names) < 2
        # Resampling shrinks a variance by (P - 1) / P, and takes the variance that it finds for the true one.
        self._widen: Array = np.sqrt(len(names) / generator.chisquare(max(len(names) - 1, 1), size=samples))

    def estimate(self, statistic: Callable[[Array], Array]) -> Estimate:
        """Of a statistic that maps ``(K, N)`` weights to its ``(K,)`` values."""
        if self._single:
            return Estimate(float(statistic(self.weights[:1])[0]))
        values = statistic(self.weights)
        value, resampled = values[0], values[1:]
        wider = np.clip(value + self._widen * (resampled - value), resampled.min(), resampled.max())
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(wider, [tail, 1 - tail])
        return Estimate(float(value), float(low), float(high))

    def mean(self, values: Sequence[float], per: Sequence[float] | None = None) -> Estimate:
        """The mean of ``values``, or their sum over that of ``per``, such as entropy per token."""
        total = np.asarray(values, dtype=np.float64)
        counted = np.ones_like(total) if per is None else np.asarray(per, dtype=np.float64)
        return self.estimate(lambda weights: weights @ total / (weights @ counted))
