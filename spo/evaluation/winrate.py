"""Win rates with intervals, plain and at equal length."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from spo.stats import Array, Bootstrap

# Keeps the slope finite where length alone decides. In units of samples, so that the data outweighs it.
RIDGE = 0.001
_ITERATIONS, _LARGEST_STEP, _LARGEST_LOGIT = 60, 2.0, 30.0
_NUMBERS_AT_ONCE = 4_000_000


def verdict_of_rewards(first: float, second: float) -> float:
    """Return 1 if the first reward is higher, 0 if it is lower, 0.5 if they are equal."""
    return 0.5 + 0.5 * ((first > second) - (first < second))


def win_rates(
    verdicts: Sequence[float | None],
    length_differences: Sequence[float],
    units: Sequence[Hashable],
    bootstrap: Bootstrap,
) -> dict[str, float]:
    """Compute the share of comparisons won, with ties as half, and the same at equal length.

    Args:
        verdicts: Verdict of each comparison: 1 for a win of the policy, 0 for a loss, 0.5 for a tie, or anything
            between. ``None`` if the judge did not answer: such a comparison is skipped.
        length_differences: Tokens of the policy's completion minus those of the other one.
        units: Prompt of each comparison; all prompts have the same weight, and are what the bootstrap resamples.
        bootstrap: Settings of the intervals.

    Returns:
        ``win_rate`` and ``win_rate_length_controlled``, each with ``_ci_low`` and ``_ci_high``; empty without answers.
    """
    answered = [i for i, verdict in enumerate(verdicts) if verdict is not None]
    if not answered:
        return {}
    won = np.array([verdicts[i] for i in answered], dtype=np.float64)
    longer = np.array([length_differences[i] for i in answered], dtype=np.float64)
    resamples = bootstrap.resample([units[i] for i in answered])
    controlled = resamples.share(lambda weights: at_equal_length(won, longer, weights))
    plain = resamples.share(lambda weights: weights @ won / weights.sum(axis=1))
    return plain.as_metrics("win_rate") | controlled.as_metrics("win_rate_length_controlled")


def at_equal_length(verdicts: Array, length_differences: Array, weights: Array) -> Array:
    """Predict win rates at equal length, by a logistic regression on the difference in length.

    As in AlpacaEval 2 (Dubois et al., arXiv:2404.04475) the log-odds of a win are ``b + s tanh(d / sd(d))``, and the
    answer is ``sigmoid(b)``. Its term for the difficulty of an instruction needs results of many models and is
    omitted. Verdicts may be shares: the loss is the cross-entropy. If length has no effect, the result is the plain win
    rate.

    Args:
        verdicts: ``(N,)`` verdicts in [0, 1].
        length_differences: ``(N,)`` differences, in any unit.
        weights: ``(K, N)`` weights of the comparisons, for ``K`` regressions at once.

    Returns:
        ``(K,)`` win rates.
    """
    spread = length_differences.std()
    # Lengths are whole numbers, so many comparisons share a difference, and the loss depends on their sums alone.
    differences, place = np.unique(length_differences, return_inverse=True)
    x = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)
    at_difference = np.zeros((len(verdicts), len(x)))
    at_difference[np.arange(len(verdicts)), place] = 1.0

    def fit(part: Array, start: Array) -> Array:
        return _fit((part * verdicts) @ at_difference, part @ at_difference, x, np.repeat(start, len(part), axis=0))

    start = fit(weights[:1], np.zeros((1, 2)))
    size = max(_NUMBERS_AT_ONCE // len(verdicts), 1)
    fitted = np.vstack([fit(weights[first : first + size], start) for first in range(0, len(weights), size)])
    intercept = fitted[:, 0]
    return _sigmoid(np.where(np.abs(intercept) < _LARGEST_LOGIT, intercept, np.copysign(np.inf, intercept)))


def _fit(won: Array, weights: Array, x: Array, start: Array) -> Array:
    """Fit ``K`` weighted logistic regressions by Newton's method in bounded steps.

    Args:
        won: ``(K, U)`` weights times verdicts, summed over the comparisons at each of ``U`` values of ``x``.
        weights: ``(K, U)`` weights, summed in the same way.
        x: ``(U,)`` covariate.
        start: ``(K, 2)`` intercepts and slopes to start from.

    Returns:
        ``(K, 2)`` intercepts and slopes.
    """
    intercept, slope = start.T.copy()
    for _ in range(_ITERATIONS):
        p = _sigmoid(intercept[:, None] + slope[:, None] * x)
        residual, curvature = won - weights * p, weights * p * (1 - p)
        gradient = residual.sum(1), residual @ x - RIDGE * slope
        a, b, c = curvature.sum(1) + 1e-12, curvature @ x, curvature @ x**2 + RIDGE
        step = np.stack([c * gradient[0] - b * gradient[1], a * gradient[1] - b * gradient[0]]) / (a * c - b * b)
        step *= np.minimum(1, _LARGEST_STEP / np.maximum(np.abs(step).max(0), 1e-12))
        # If every comparison was won, the intercept would diverge; its sigmoid is 1 long before.
        intercept = np.clip(intercept + step[0], -_LARGEST_LOGIT, _LARGEST_LOGIT)
        slope = slope + step[1]
        if np.abs(step).max() < 1e-9:
            break
    return np.stack([intercept, slope], axis=1)


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))
