"""Intervals and tests for numbers that were measured with a few seeds on many prompts.

A method is run with seeds ``s`` on prompts ``p``, the same prompts each time, so its scores form a table ``(S, P)`` in
which everything of one seed moves together and everything of one prompt does. Two things are luck:

- *the prompts*: they are resampled with replacement, all seeds of a prompt together. This is the paired bootstrap, and
  covers what is particular to a prompt and to a single completion. Few prompts know little of how much prompts vary,
  so each resampled deviation is divided by what ``P`` prompts may have underestimated it by, ``sqrt(chi2 / (P - 1))``
  with ``P - 1`` degrees of freedom: what would be a normal variable becomes a Student variable;
- *the seeds*: what the means of the seeds differ by beyond that, estimated by the analysis of variance of the table,
  ``max(0, MS_seeds - MS_rest) / P``, is added as a Student variable with ``S - 1`` degrees of freedom.

Resampling three seeds as if they were many (the pigeonhole bootstrap, Owen, arXiv:0712.1111) is too sure where seeds
differ and wasteful where they do not: see docs/explanation/comparison-statistics.md for the coverage of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
_BLOCK = 4_000_000  # resampled numbers held at a time


@dataclass(frozen=True)
class Estimate:
    """A number with what is known about it.

    Attributes:
        value: The number.
        low: Lower end of its interval; ``None`` where a single number, or a few that are all equal, cannot say.
        high: Upper end.
        p: Probability of a value at least as far from zero, if it were zero; meant for differences.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Bootstrap:
    """How intervals and tests are made.

    Attributes:
        confidence: Of the intervals.
        draws: Resamples; no p-value can be smaller than ``1 / (draws + 1)``.
        seed: Of the resampling. Every call starts from it, so that a number does not depend on the ones before it.
    """

    confidence: float = 0.95
    draws: int = 10_000
    seed: int = 0

    def mean(self, scores: Scores) -> Estimate:
        """Mean of a table of scores, over seeds and prompts.

        Args:
            scores: ``(S, P)``, one row per seed, one column per prompt; one column where a seed has one number only.

        Raises:
            ValueError: There are no scores.
        """
        return self._estimate([scores])

    def difference(self, first: Scores, second: Scores, *, paired: bool) -> Estimate:
        """Difference of two means over the same prompts.

        Args:
            first: ``(S, P)``.
            second: ``(T, P)``.
            paired: Whether row ``s`` of both has the same seed, so that what the seed does to both cancels.
        """
        if paired:
            return self._estimate([first - second])
        return self._estimate([first, -second])

    def _estimate(self, tables: Sequence[Scores]) -> Estimate:
        """Estimates the sum of the means of tables that share their prompts and not their seeds."""
        if any(table.size == 0 for table in tables):
            raise ValueError("there are no scores")
        prompts = np.sum([table.mean(axis=0) for table in tables], axis=0)
        value = float(prompts.mean())
        generator = np.random.default_rng(self.seed)
        deviation = self._prompt_luck(prompts, generator)
        for table in tables:
            seeds = len(table)
            if seeds > 1:
                scale = math.sqrt(seed_variance(table) / seeds)
                deviation += scale * generator.standard_t(seeds - 1, self.draws)
        units = max(len(prompts), *map(len, tables))
        if np.abs(deviation).max() < 1e-12 and 2.0 ** (1 - units) > 1 - self.confidence:
            return Estimate(value)  # so few equal numbers, or a single one: chance alone would have their signs agree
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(value + deviation, [tail, 1 - tail])
        # A resampled mean of equal numbers differs from them by rounding, which is no evidence of anything.
        size = abs(value) if abs(value) > 1e-12 else 0.0
        beyond = int((np.abs(deviation) >= size).sum())
        return Estimate(value, float(low), float(high), (1 + beyond) / (1 + self.draws))

    def _prompt_luck(self, prompts: Scores, generator: np.random.Generator) -> Scores:
        """What the mean over resampled prompts differs from the mean by; ``(draws,)``."""
        count = len(prompts)
        if count == 1:
            return np.zeros(self.draws)
        centred = prompts - prompts.mean()
        block = max(1, _BLOCK // count)
        means = [
            centred[generator.integers(0, count, size=(min(block, self.draws - first), count))].mean(axis=1)
            for first in range(0, self.draws, block)
        ]
        # Resampling shrinks a variance by (count - 1) / count, and takes the variance that it finds for the true one.
        return np.concatenate(means) * np.sqrt(count / generator.chisquare(count - 1, self.draws))


def seed_variance(scores: Scores) -> float:
    """Variance of what a seed adds to all its scores, by the analysis of variance of ``(S, P)``; 0 for one seed.

    With one column nothing tells a seed's effect from the rest, and all of the variance counts as the seed's.
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
    """Adjusts p-values of several tests so that the chance of any false positive stays the level (Holm, 1979).

    Args:
        p_values: One per test.

    Returns:
        The adjusted ones in the same order, each to be compared with the level itself.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats, for a cost (less is better) and a gain (more is better).

    Args:
        points: Pairs of cost and gain.

    Returns:
        Their positions, from the least cost to the largest gain.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front
