"""Intervals and tests for numbers that were measured on some prompts, with one seed or several.

All of them rest on one bootstrap (:class:`Bootstrap`) with two views of the data:

- *weights over samples* (:meth:`Bootstrap.resample`) for one evaluation, where any statistic can be computed from
  weighted samples, such as a ratio of sums or a regression;
- *tables of scores* (:meth:`Bootstrap.mean`, :meth:`Bootstrap.difference`) for several runs, where a method is run with
  seeds ``s`` on the same prompts ``p``. Its scores form a table ``(S, P)``: everything of one seed moves together, and
  so does everything of one prompt.

Prompts are resampled with replacement, together with all their samples and seeds. This is the paired bootstrap: what
makes a prompt hard for both sides of a comparison cancels. With few prompts the bootstrap underestimates how much
prompts vary, so each resampled deviation gets a Student-t correction: it is divided by ``sqrt(chi2 / (P - 1))`` with
``P - 1`` degrees of freedom, which turns a normal variable into a Student variable.

Seeds are too few to be resampled. The variance that they add is estimated by the analysis of variance of the table,
``max(0, MS_seeds - MS_rest) / P``, and enters as a Student variable with ``S - 1`` degrees of freedom. Resampling three
seeds as if they were many (the pigeonhole bootstrap, Owen, arXiv:0712.1111) is overconfident where seeds differ and
wasteful where they do not: see docs/explanation/comparison-statistics.md for the coverage of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Resampled numbers held in memory at a time; changing it changes no result.
_NUMBERS_PER_BLOCK = 4_000_000
# Differences below this are rounding errors of means in float64.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A number with its interval and test.

    Attributes:
        value: The number.
        low: Lower end of its interval; ``None`` where one number, or a few equal ones, do not allow an interval.
        high: Upper end of its interval; ``None`` where ``low`` is.
        p: Probability of a value at least as far from zero if the true value were zero; ``None`` without a test.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    def as_metrics(self, name: str) -> dict[str, float]:
        """Return ``NAME`` and, where there is an interval, ``NAME_ci_low`` and ``NAME_ci_high``."""
        ends = {f"{name}_ci_low": self.low, f"{name}_ci_high": self.high}
        return {name: self.value} | {key: end for key, end in ends.items() if end is not None}


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the bootstrap, and the statistics that use it.

    Attributes:
        confidence: Confidence level of the intervals, such as 0.95.
        draws: Number of resamples; no p-value can be smaller than ``1 / (draws + 1)``.
        seed: Random seed. Every call starts from it, so that a number does not depend on the calls before it.
    """

    confidence: float = 0.95
    draws: int = 10_000
    seed: int = 0

    def resample(self, units: Sequence[Hashable]) -> Resamples:
        """Draw weights for samples.

        Args:
            units: Prompt of each sample, or whatever else is independent; all prompts have the same weight.
        """
        generator = np.random.default_rng(self.seed)
        names = {name: place for place, name in enumerate(dict.fromkeys(units))}
        place = np.array([names[unit] for unit in units])
        even = np.full(len(names), 1 / len(names))
        drawn = generator.multinomial(len(names), even, size=self.draws)
        counts, sizes = np.vstack([np.ones(len(names)), drawn]), np.bincount(place)
        return Resamples(
            weights=counts[:, place] * (sizes.max() / sizes[place]),
            student_factors=_student_factors(len(names), self.draws, generator),
            confidence=self.confidence,
            single=len(names) < 2,
        )

    def mean(self, scores: Array) -> Estimate:
        """Estimate the mean of a table of scores over seeds and prompts.

        Args:
            scores: ``(S, P)``, one row per seed and one column per prompt; one column if a seed has a single number.

        Raises:
            ValueError: If there are no scores.
        """
        return self._sum_of_means([scores])

    def difference(self, first: Array, second: Array, *, paired: bool) -> Estimate:
        """Estimate the difference of two means over the same prompts.

        Args:
            first: ``(S, P)`` scores.
            second: ``(T, P)`` scores.
            paired: Whether row ``s`` of both tables has the same seed, so that the effect of the seed cancels.

        Raises:
            ValueError: If there are no scores.
        """
        if paired:
            return self._sum_of_means([first - second])
        return self._sum_of_means([first, -second])

    def _sum_of_means(self, tables: Sequence[Array]) -> Estimate:
        """Estimate the sum of the means of tables that share their prompts but not their seeds."""
        if any(table.size == 0 for table in tables):
            raise ValueError("there are no scores")
        of_prompts = np.sum([table.mean(axis=0) for table in tables], axis=0)
        value = float(of_prompts.mean())
        generator = np.random.default_rng(self.seed)
        deviation = self._prompt_deviations(of_prompts, generator)
        for table in tables:
            seeds = len(table)
            if seeds > 1:
                scale = math.sqrt(seed_variance(table) / seeds)
                deviation += scale * generator.standard_t(seeds - 1, self.draws)
        units = max(len(of_prompts), *map(len, tables))
        # A few equal numbers do not allow an interval: chance alone gives them equal signs too often.
        if np.abs(deviation).max() < _ROUNDING and 2.0 ** (1 - units) > 1 - self.confidence:
            return Estimate(value)
        low, high = _interval(value + deviation, self.confidence)
        # Resampled means of equal numbers differ by rounding errors, which must not count as evidence.
        size = abs(value) if abs(value) > _ROUNDING else 0.0
        beyond = int((np.abs(deviation) >= size).sum())
        return Estimate(value, low, high, (1 + beyond) / (1 + self.draws))

    def _prompt_deviations(self, of_prompts: Array, generator: np.random.Generator) -> Array:
        """Return how far the means over resampled prompts lie from the mean, ``(draws,)``."""
        count = len(of_prompts)
        if count == 1:
            return np.zeros(self.draws)
        centered = of_prompts - of_prompts.mean()
        block = max(1, _NUMBERS_PER_BLOCK // count)
        means = [
            centered[generator.integers(0, count, size=(min(block, self.draws - first), count))].mean(axis=1)
            for first in range(0, self.draws, block)
        ]
        return np.concatenate(means) * _student_factors(count, self.draws, generator)


@dataclass(frozen=True, eq=False)
class Resamples:
    """Weights of samples in the data and in each resample of the prompts.

    Every statistic of an evaluation uses the same resamples. An interval never leaves the range of the resampled
    values. That of fewer than six prompts is too short: the range of ``n`` prompts misses their median with
    probability ``2^(1 - n)``. A single prompt gives no interval.

    Attributes:
        weights: ``(1 + draws, N)``; the first row weighs the samples as they are, each other row is a resample.
        student_factors: ``(draws,)``, by which resampled deviations are stretched.
        confidence: Confidence level of the intervals.
        single: Whether there is a single prompt.
    """

    weights: Array
    student_factors: Array
    confidence: float
    single: bool

    def estimate(self, statistic: Callable[[Array], Array]) -> Estimate:
        """Estimate a statistic.

        Args:
            statistic: Function that maps ``(K, N)`` weights to ``(K,)`` values.
        """
        if self.single:
            return Estimate(float(statistic(self.weights[:1])[0]))
        values = statistic(self.weights)
        value, resampled = values[0], values[1:]
        stretched = value + self.student_factors * (resampled - value)
        return Estimate(float(value), *_interval(np.clip(stretched, resampled.min(), resampled.max()), self.confidence))

    def mean(self, values: Sequence[float], per: Sequence[float] | None = None) -> Estimate:
        """Estimate a mean, or a ratio of sums.

        Args:
            values: ``(N,)``, one number per sample.
            per: ``(N,)`` numbers to divide by, such as tokens for an entropy per token; ``None`` for the plain mean.
        """
        total = np.asarray(values, dtype=np.float64)
        counted = np.ones_like(total) if per is None else np.asarray(per, dtype=np.float64)
        return self.estimate(lambda weights: weights @ total / (weights @ counted))


def _student_factors(count: int, draws: int, generator: np.random.Generator) -> Array:
    """Return factors that turn resampled deviations of ``count`` prompts into Student variables, ``(draws,)``."""
    # Resampling shrinks a variance by (count - 1) / count, and takes the variance that it finds for the true one.
    return np.sqrt(count / generator.chisquare(max(count - 1, 1), size=draws))


def _interval(values: Array, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def seed_variance(scores: Array) -> float:
    """Return the variance that a seed adds to all its scores, by the analysis of variance; 0 for one seed.

    With one column a seed's effect cannot be separated from the rest, so all of the variance counts as the seed's.

    Args:
        scores: ``(S, P)``, one row per seed.
    """
    seeds, prompts = scores.shape
    if seeds == 1:
        return 0.0
    of_seeds, of_prompts = scores.mean(axis=1), scores.mean(axis=0)
    between = prompts * float(of_seeds.var(ddof=1))
    if prompts == 1:
        return between
    rest = scores - of_seeds[:, None] - of_prompts[None, :] + scores.mean()
    within = float((rest**2).sum()) / ((seeds - 1) * (prompts - 1))
    return max(0.0, between - within) / prompts


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests so that the chance of any false positive stays the level (Holm, 1979).

    Args:
        p_values: P-value of each test.

    Returns:
        The adjusted p-values in the same order, each to be compared with the level itself.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other point beats, for a cost (less is better) and a gain (more is better).

    Args:
        points: Cost and gain of each point.

    Returns:
        Positions of the points, from the least cost to the largest gain.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front
