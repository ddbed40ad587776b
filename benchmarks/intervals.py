"""Simulation of how often intervals and tests are right, for docs/explanation/comparison-statistics.md.

Usage: ``python -m benchmarks.intervals [differences] [power] [shares] [--tables N] [--seed N]``

Tables of verdicts with known effects of prompts and seeds are drawn, and given to the functions that `spo compare` and
`spo evaluate` use. Without a name, all three parts are printed as Markdown. With the default of 2000 tables for each
number, a rate of 5% has a standard error of 0.5 percent points, and each part takes a few minutes on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from spo.stats import Array, Bootstrap, Estimate, Resamples

EFFECTS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Standard deviations of the effect of a seed, in logits of the win rate."""
LOGIT = 0.4
"""Logit of the win rate on the average prompt."""
DRAWS = 399
"""Resamples of each table. (DRAWS + 1) / 20 is whole, so that a test can have a level of exactly 5%."""
_Z = 1.96
_POWER = 0.8


@dataclass(frozen=True)
class Found:
    """Differences between two methods that are equally good.

    Attributes:
        known: Standard deviation of the estimated difference.
        lows: ``(N,)`` lower ends of the intervals, one per simulated comparison.
        highs: ``(N,)`` upper ends.
        p_values: ``(N,)`` p-values.
    """

    known: float
    lows: Array
    highs: Array
    p_values: Array

    @property
    def false(self) -> float:
        """Return the share of comparisons that find a difference."""
        return float((self.p_values <= 0.05).mean())

    @property
    def width(self) -> float:
        """Return the mean width of the intervals relative to one that knows the variance of the difference."""
        return float((self.highs - self.lows).mean() / (2 * _Z * self.known))

    @property
    def detectable(self) -> float:
        """Return the difference that is found with a probability of 80%."""
        # A real difference moves estimates and intervals; it is found where the interval then excludes zero.
        needed = np.sort(-self.lows)
        return float(needed[math.ceil(_POWER * len(needed)) - 1])


def verdicts(generator: np.random.Generator, seeds: int, prompts: Array, of_seed: float) -> Array:
    """Draw a table of wins and losses.

    Args:
        generator: Source of random numbers.
        seeds: Number of seeds.
        prompts: ``(1, P)`` effects of the prompts, in logits.
        of_seed: Standard deviation of the effect of a seed, in logits.

    Returns:
        ``(S, P)`` verdicts, 1 for a win.
    """
    logits = LOGIT + of_seed * generator.standard_normal((seeds, 1)) + prompts
    return (generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float64)


def differences(seeds: int, prompts: int, of_seed: float, tables: int, seed: int) -> Found:
    """Compare two equally good methods many times.

    Args:
        seeds: Number of seeds of each method.
        prompts: Number of prompts.
        of_seed: Standard deviation of the effect of a seed, in logits.
        tables: Number of comparisons.
        seed: Random seed.
    """
    generator = np.random.default_rng([seed, seeds, prompts, round(100 * of_seed)])
    found = []
    for _ in range(tables):
        of_prompts = generator.standard_normal((1, prompts))
        first, second = (verdicts(generator, seeds, of_prompts, of_seed) for _ in range(2))
        found.append(Bootstrap(draws=DRAWS, seed=int(generator.integers(2**32))).difference(first, second, paired=True))
    lows, highs, p_values = np.array([[one.low, one.high, one.p] for one in found], dtype=np.float64).T
    return Found(known_deviation(seeds, prompts, of_seed), lows, highs, p_values)


def known_deviation(seeds: int, prompts: int, of_seed: float) -> float:
    """Compute the standard deviation of the difference of two equally good methods, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    rates = 1 / (1 + np.exp(-(LOGIT + of_seed * nodes[:, None] + nodes[None, :])))  # seed effects by prompt effects
    of_seeds, of_prompts, mean = rates @ weights, weights @ rates, weights @ rates @ weights
    seed = weights @ (of_seeds - mean) ** 2
    interaction = weights @ (rates - of_seeds[:, None] - of_prompts[None, :] + mean) ** 2 @ weights
    chance = weights @ (rates * (1 - rates)) @ weights
    return math.sqrt(2 / seeds * (seed + (interaction + chance) / prompts))


def share_intervals(
    rate: float, prompts: int, samples: int, alike: float, ties: float, tables: int, seed: int
) -> tuple[float, float]:
    """Evaluate a policy with a known win rate many times.

    Args:
        rate: True win rate.
        prompts: Number of prompts.
        samples: Samples per prompt.
        alike: Correlation of the verdicts of two samples of a prompt.
        ties: Share of the verdicts that are ties.
        tables: Number of evaluations.
        seed: Random seed.

    Returns:
        Share of intervals that contain the rate, and their mean width relative to Wilson's for one sample per prompt.
    """
    generator = np.random.default_rng([seed, prompts, samples, round(1000 * rate), round(100 * alike)])
    units = np.repeat(np.arange(prompts), samples).tolist()
    won = (rate - ties / 2) / (1 - ties)
    covered, width, wilson = 0, 0.0, 0.0
    for _ in range(tables):
        # With probability sqrt(alike) a verdict is that of its prompt, otherwise it is its own.
        shared, own = generator.random((prompts, 1)) < won, generator.random((prompts, samples)) < won
        verdict = np.where(generator.random((prompts, samples)) < math.sqrt(alike), shared, own).astype(np.float64)
        verdict[generator.random((prompts, samples)) < ties] = 0.5
        resamples = Bootstrap(draws=DRAWS, seed=int(generator.integers(2**32))).resample(units)
        found = _win_rate(resamples, verdict.ravel())
        assert found.low is not None and found.high is not None, "there are several prompts"
        covered += found.low <= rate <= found.high
        width += found.high - found.low
        scale = _Z**2 / prompts
        wilson += 2 * math.sqrt(scale * found.value * (1 - found.value) + scale**2 / 4) / (1 + scale)
    return covered / tables, width / wilson


def _win_rate(resamples: Resamples, verdict: Array) -> Estimate:
    return resamples.share(lambda weights: weights @ verdict / weights.sum(axis=1))


def print_differences(tables: int, seed: int) -> None:
    """Print the level of the test and the width of its interval by seeds and the effect of a seed, for 256 prompts."""
    print("| seeds |", *(f"{effect:g} |" for effect in EFFECTS))
    print("|---|" + "---|" * len(EFFECTS))
    for seeds in (2, 3, 5):
        found = [differences(seeds, 256, effect, tables, seed) for effect in EFFECTS]
        print(f"| {seeds} |", *(f"{one.false:.1%} / {one.width:.2f} |" for one in found), flush=True)


def print_power(tables: int, seed: int) -> None:
    """Print which difference in win rate is found with a probability of 80%."""
    seeds, effects = (1, 2, 3, 5, 10), (0.0, 0.2)
    print("| prompts | seed effect |", *(f"{count} seed{'s' * (count > 1)} |" for count in seeds))
    print("|---|---|" + "---|" * len(seeds))
    for prompts, effect in product((64, 256, 1024), effects):
        found = [differences(count, prompts, effect, tables, seed).detectable for count in seeds]
        print(f"| {prompts} | {effect:g} |", *(f"{one:.3f} |" for one in found), flush=True)


def print_shares(tables: int, seed: int) -> None:
    """Print how often the interval of a win rate contains it, and its width relative to Wilson's."""
    rates = (0.5, 0.8, 0.9, 0.95, 0.97)
    print("| prompts | samples | verdicts |", *(f"{rate:g} |" for rate in rates))
    print("|---|---|---|" + "---|" * len(rates))
    for prompts, (samples, alike, ties) in product((32, 48, 64), ((1, 0.0, 0.0), (4, 0.4, 0.0), (4, 0.8, 0.05))):
        words = f"alike to {alike:.0%}" * (samples > 1) + f", {ties:.0%} ties" * (ties > 0)
        found = [share_intervals(rate, prompts, samples, alike, ties, tables, seed) for rate in rates]
        print(
            f"| {prompts} | {samples} | {words or 'one each'} |",
            *(f"{covered:.1%} / {width:.2f} |" for covered, width in found),
            flush=True,
        )


PARTS = {"differences": print_differences, "power": print_power, "shares": print_shares}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--tables", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    for part in options.parts or PARTS:
        print(f"\n{part}\n")
        PARTS[part](options.tables, options.seed)


if __name__ == "__main__":
    main()
