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

Seeds are too few to be resampled. What they add is a Student variable with the mean square of the seeds, from the
analysis of variance of the table. The variance of the seeds alone is not estimated: it would have to be cut at zero,
which gives intervals of prompts alone whenever a few seeds happen to agree.

Shares such as a win rate have an interval of Wilson's form (1927), in which samples of a prompt, ties and seeds enter
through the width of the interval above. docs/explanation/comparison-statistics.md has the formulas and simulations.
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
# Weight of independent verdicts in the interval of a share, in prompts. With 1, 32 prompts were covered in 0.92 only.
_PRIOR_PROMPTS = 2
# Differences below this are rounding errors of means in float64.
_ROUNDING = 1e-12
# Share of the interval of prompts alone that an interval over seeds keeps at least. With 1, three seeds without any
# effect reject in 2.1% of the cases where 5% are meant; with 0, an interval may shrink to a point by luck.
PROMPTS_FLOOR = 0.65
# Factor of intervals over seeds. Effects on a share are bounded, which makes Student's t reject in up to 5.5%.
SEEDS_ALLOWANCE = 1.03


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
            student=generator.standard_t(max(len(names) - 1, 1), self.draws),
            confidence=self.confidence,
            units=len(names),
        )

    def mean(self, scores: Array) -> Estimate:
        """Estimate the mean of a table of scores over seeds and prompts.

        Args:
            scores: ``(S, P)``, one row per seed and one column per prompt; one column if a seed has a single number.

        Raises:
            ValueError: If there are no scores, or one is not finite.
        """
        _require_scores(scores)
        return self._estimate(scores.mean(axis=0), len(scores), self._mean_deviations(scores))

    def share(self, scores: Array, by_opponent: Array | None = None) -> Estimate:
        """Estimate a share, such as a win rate, and test it against one half.

        Args:
            scores: ``(S, P)`` scores whose mean lies in [0, 1]; at least two prompts.
            by_opponent: ``(T, P)`` the same scores by the seed of an opponent that has other seeds, where both vary.

        Raises:
            ValueError: If there are no scores, or one is not finite.
        """
        _require_scores(scores)
        (seeds, prompts), value = scores.shape, min(1.0, max(0.0, float(scores.mean())))
        tables = [scores] if by_opponent is None else [scores, by_opponent]
        deviations = self._mean_deviations(*tables)
        if _too_few(deviations, max(seeds, prompts), self.confidence):
            return Estimate(value)
        student = np.random.default_rng(self.seed).standard_t(prompts - 1, self.draws)
        scales = _wilson_scales(value, deviations, student, prompts)
        # The test inverts the interval: p is the level at which an end of the interval is one half.
        beyond = int((scales >= 4 * (value - 0.5) ** 2 - _ROUNDING).sum())
        return Estimate(value, *_wilson(value, scales, self.confidence), (1 + beyond) / (1 + self.draws))

    def difference(self, first: Array, second: Array, *, paired: bool) -> Estimate:
        """Estimate the difference of two means over the same prompts.

        Both methods are taken to vary as much over seeds, each seed moving each method by itself. The seed variance is
        therefore estimated from both tables together.

        Args:
            first: ``(S, P)`` scores.
            second: ``(T, P)`` scores.
            paired: Whether row ``s`` of both tables has the same seed, so that what both share of it cancels.

        Raises:
            ValueError: If there are no scores, or one is not finite.
        """
        _require_scores(first, second)
        if paired:
            # The sum and the difference of two independent seed effects have the same variance. The one with less
            # noise counts more: if samples are shared, that is the difference.
            halves = [(first - second) / math.sqrt(2), (first + second) / math.sqrt(2)]
            noises = [_noise(table) for table in halves]
            effect = seed_effect(halves, noises[::-1] if any(noises) else [1.0, 1.0])
            of_prompts, scale = (first - second).mean(axis=0), 2 / len(first)
        else:
            effect = seed_effect([first, second], [1.0, 1.0])
            of_prompts, scale = first.mean(axis=0) - second.mean(axis=0), 1 / len(first) + 1 / len(second)
        deviations = self._deviations(of_prompts, effect, scale)
        return self._estimate(of_prompts, max(len(first), len(second)), deviations)

    def _estimate(self, of_prompts: Array, seeds: int, deviations: Array) -> Estimate:
        value = float(of_prompts.mean())
        if _too_few(deviations, max(len(of_prompts), seeds), self.confidence):
            return Estimate(value)
        low, high = _interval(value + deviations, self.confidence)
        # Resampled means of equal numbers differ by rounding errors, which must not count as evidence.
        size = abs(value) if abs(value) > _ROUNDING else 0.0
        beyond = int((np.abs(deviations) >= size).sum())
        return Estimate(value, low, high, (1 + beyond) / (1 + self.draws))

    def _mean_deviations(self, *tables: Array) -> Array:
        effect, scale = seed_effect(tables, [1.0] * len(tables)), sum(1 / len(table) for table in tables)
        return self._deviations(tables[0].mean(axis=0), effect, scale)

    def _deviations(self, of_prompts: Array, effect: SeedEffect, scale: float) -> Array:
        """Return how far the estimate may lie from the truth, ``(draws,)`` in increasing order.

        Args:
            of_prompts: ``(P,)`` mean of each prompt over seeds.
            effect: What is known about the effect of a seed.
            scale: Factor of that variance in the variance of the estimate, ``1 / S`` for the mean over ``S`` seeds.
        """
        generator = np.random.default_rng(self.seed)
        alone = self._prompt_deviations(of_prompts, generator)
        if effect.freedom == 0:
            return np.sort(alone)
        # The mean square of seeds holds the noise of each seed's samples, which the variance over prompts holds too.
        count = len(of_prompts)
        of_prompt = float(of_prompts.var(ddof=1)) / count if count > 1 else 0.0
        rest = max(0.0, 1 - scale * effect.noise / of_prompt) if of_prompt > 0 else 0.0
        of_seeds = math.sqrt(scale * effect.mean_square) * generator.standard_t(effect.freedom, self.draws)
        both = SEEDS_ALLOWANCE * np.sort(math.sqrt(rest) * alone + of_seeds)
        floor = PROMPTS_FLOOR * np.sort(alone)
        return np.where(np.abs(both) >= np.abs(floor), both, floor)

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
        student: ``(draws,)`` Student variables, which stand in for the deviations of a share of 0 or 1.
        confidence: Confidence level of the intervals.
        units: Number of prompts.
    """

    weights: Array
    student_factors: Array
    student: Array
    confidence: float
    units: int

    def estimate(self, statistic: Callable[[Array], Array]) -> Estimate:
        """Estimate a statistic.

        Args:
            statistic: Function that maps ``(K, N)`` weights to ``(K,)`` values.
        """
        if self.units < 2:
            return Estimate(float(statistic(self.weights[:1])[0]))
        values = statistic(self.weights)
        value, resampled = values[0], values[1:]
        stretched = value + self.student_factors * (resampled - value)
        return Estimate(float(value), *_interval(np.clip(stretched, resampled.min(), resampled.max()), self.confidence))

    def share(self, statistic: Callable[[Array], Array]) -> Estimate:
        """Estimate a statistic that is a share of the prompts, such as a win rate.

        Args:
            statistic: Function that maps ``(K, N)`` weights to ``(K,)`` values in [0, 1].
        """
        if self.units < 2:
            return self.estimate(statistic)
        values = statistic(self.weights)
        value = float(values[0])
        scales = _wilson_scales(value, self.student_factors * (values[1:] - value), self.student, self.units)
        return Estimate(value, *_wilson(value, scales, self.confidence))

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


def _too_few(deviations: Array, numbers: int, confidence: float) -> bool:
    """Return whether a few equal numbers do not allow an interval: chance alone gives them equal signs too often."""
    return float(np.abs(deviations).max()) < _ROUNDING and 2.0 ** (1 - numbers) > 1 - confidence


def _require_scores(*tables: Array) -> None:
    if any(table.size == 0 for table in tables):
        raise ValueError("there are no scores")
    if not all(np.isfinite(table).all() for table in tables):
        raise ValueError("scores have to be finite")  # Comparisons with NaN are false, which would look significant.


# --- shares --------------------------------------------------------------------------------------------------------


def _wilson_scales(share: float, deviations: Array, student: Array, prompts: int) -> Array:
    """Return the squared deviations of a share, in units of its variance ``share (1 - share)``, in increasing order.

    Among ``n`` independent verdicts the quantile of the result is Wilson's ``z^2 / n``. The deviations say how much
    less or more a design is worth than that. Near 0 and 1 few verdicts differ, and the deviations of a few say little.
    They are therefore averaged with those of one verdict per prompt, which count as much as two prompts with the
    verdicts of a coin.

    Args:
        share: Estimate, in [0, 1].
        deviations: ``(draws,)`` deviations of the estimate.
        student: ``(draws,)`` Student variables with ``prompts - 1`` degrees of freedom.
        prompts: Number of prompts, at least two.
    """
    found, alone = np.sort(deviations**2), np.sort(student**2) / (prompts - 1)
    evidence = 4 * prompts  # the number of prompts that a variance of 1/4 counts as
    scales = (evidence * found + _PRIOR_PROMPTS * alone) / (evidence * share * (1 - share) + _PRIOR_PROMPTS)
    # Exact enumeration of 32 to 64 binary verdicts finds 0.94 and more with this term, even by 2000 resamples; without
    # it Wilson's interval falls to 0.92 at some rates.
    return scales * (1 + 4 / prompts)


def _wilson(share: float, scales: Array, confidence: float) -> tuple[float, float]:
    """Return the shares ``q`` for which ``(share - q)^2 <= scale q (1 - q)``."""
    scale = float(np.quantile(scales, confidence))
    center = (share + scale / 2) / (1 + scale)
    half = math.sqrt(scale * share * (1 - share) + scale**2 / 4) / (1 + scale)
    return min(share, max(0.0, center - half)), max(share, min(1.0, center + half))


# --- seeds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeedEffect:
    """Evidence of tables of scores about how the means of seeds vary.

    Attributes:
        mean_square: Variance of the means of seeds over prompts.
        noise: Part of that variance that prompts and samples explain. The difference is an unbiased estimate of the
            variance of the effect of a seed; it is negative where seeds happen to agree.
        freedom: Degrees of freedom of the mean square; 0 where no table has two seeds, and nothing is known.
    """

    mean_square: float
    noise: float
    freedom: float


def seed_effect(tables: Sequence[Array], weights: Sequence[float]) -> SeedEffect:
    """Estimate how the means of seeds vary, by the analysis of variance of several tables.

    With one column a seed's effect cannot be separated from the rest, so all of the variance counts as the seed's.

    Args:
        tables: ``(S, P)`` tables, one row per seed, in which the effect of a seed has the same variance.
        weights: Weight of each degree of freedom of a table.
    """
    known = [(table, weight) for table, weight in zip(tables, weights, strict=True) if len(table) > 1]
    if not known:
        return SeedEffect(0.0, 0.0, 0.0)
    freedoms = np.array([len(table) - 1 for table, _ in known])
    noises = np.array([_noise(table) for table, _ in known])
    between = np.array([table.mean(axis=1).var(ddof=1) for table, _ in known])
    shares = freedoms * np.array([weight for _, weight in known])
    shares = shares / shares.sum()
    mean_square, noise = float(shares @ between), float(shares @ noises)
    # Satterthwaite: the degrees of freedom of a sum of mean squares follow from what is expected of each.
    parts = shares * (noises + max(0.0, mean_square - noise))
    freedom = parts.sum() ** 2 / (parts**2 @ (1 / freedoms)) if parts.any() else freedoms.sum()
    return SeedEffect(mean_square, noise, float(freedom))


def _noise(scores: Array) -> float:
    """Return the variance of a seed's mean over prompts that prompts and samples explain, 0 where it is unknown."""
    seeds, prompts = scores.shape
    if seeds == 1 or prompts == 1:
        return 0.0
    rest = scores - scores.mean(axis=1)[:, None] - scores.mean(axis=0)[None, :] + scores.mean()
    return float((rest**2).sum()) / ((seeds - 1) * (prompts - 1)) / prompts


# --- several tests -------------------------------------------------------------------------------------------------


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
