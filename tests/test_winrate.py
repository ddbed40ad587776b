"""Win rates, plain and at equal length, and the bootstrap under them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from spo.evaluation import at_equal_length, win_rates
from spo.stats import Bootstrap

BOOTSTRAP = Bootstrap(confidence=0.95, draws=400, seed=0)


def rates(verdicts: Any, longer: Any, units: Any = None, **changes: Any) -> dict[str, float]:
    units = range(len(verdicts)) if units is None else units
    return win_rates(list(verdicts), list(longer), list(units), replace(BOOTSTRAP, **changes))


def controlled(verdicts: Any, longer: Any) -> float:
    verdicts, longer = np.asarray(verdicts, dtype=float), np.asarray(longer, dtype=float)
    return float(at_equal_length(verdicts, longer, np.ones((1, len(verdicts))))[0])


def test_win_rate_by_hand_with_ties_and_missing_verdicts() -> None:
    found = rates([1.0, 0.0, 0.5, None, 1.0], [0, 0, 0, 99, 0])
    assert found["win_rate"] == 2.5 / 4
    assert found["win_rate_length_controlled"] == pytest.approx(2.5 / 4)
    assert rates([None, None], [1, 2]) == {}
    # Prompts have the same weight for any number of verdicts.
    uneven = rates([1.0, None, 0.0, 0.0], [0] * 4, ["a", "a", "b", "b"])
    assert uneven["win_rate"] == 0.5 and uneven["win_rate_length_controlled"] == pytest.approx(0.5)


def test_equal_length_rate_is_the_plain_rate_without_a_length_effect() -> None:
    verdicts = [1, 1, 1, 0] * 20
    for longer in ([0] * 80, [7] * 40 + [-7] * 40, [3, 3, 3, 3, -5, -5, -5, -5] * 10):
        assert controlled(verdicts, longer) == pytest.approx(0.75, abs=1e-9)
    soft = [0.9, 0.4] * 30
    assert controlled(soft, [5, 5, -5, -5] * 15) == pytest.approx(0.65, abs=1e-9)


def test_equal_length_rate_is_half_where_length_decides() -> None:
    longer = np.random.default_rng(0).normal(size=400)
    longer = np.concatenate([longer, -longer])
    assert (longer > 0).mean() == 0.5
    assert controlled(longer > 0, longer) == pytest.approx(0.5, abs=1e-6)
    # Three quarters of the answers are longer and win: at equal length the interval contains one half.
    longer = np.concatenate([np.linspace(1, 60, 300), np.linspace(-60, -1, 100)])
    found = rates((longer > 0).astype(float), longer)
    assert found["win_rate"] == 0.75
    low, high = found["win_rate_length_controlled_ci_low"], found["win_rate_length_controlled_ci_high"]
    assert found["win_rate_ci_low"] > 0.7 and low < 0.5 < high
    assert all(math.isfinite(value) for value in found.values())


def test_equal_length_rate_recovers_the_true_intercept() -> None:
    rng = np.random.default_rng(1)
    longer = rng.normal(20, 30, size=20_000)
    log_odds = 0.8 + 1.5 * np.tanh(longer / longer.std())
    verdicts = (rng.random(20_000) < 1 / (1 + np.exp(-log_odds))).astype(float)
    assert controlled(verdicts, longer) == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.02)
    assert verdicts.mean() > 0.75


def test_equal_length_rate_agrees_with_an_independent_fit() -> None:
    rng = np.random.default_rng(2)
    verdicts, longer = rng.choice([0, 0.5, 1, 0.8], size=50), rng.normal(5, 20, size=50)
    weights = Bootstrap(draws=6, seed=3).resample(range(50)).weights
    found = at_equal_length(verdicts, longer, weights)
    x, v = torch.tensor(np.tanh(longer / longer.std())), torch.tensor(verdicts)
    for row, value in zip(torch.tensor(weights), found, strict=True):
        parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([parameters], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15)

        def closure(row: torch.Tensor = row, p: torch.Tensor = parameters, o: Any = optimizer) -> torch.Tensor:
            o.zero_grad()
            losses = torch.nn.functional.binary_cross_entropy_with_logits(p[0] + p[1] * x, v, reduction="none")
            loss = (row * losses).sum() + 0.0005 * p[1] ** 2
            loss.backward()
            return loss

        optimizer.step(closure)
        assert value == pytest.approx(parameters[0].sigmoid().item(), abs=1e-5)


@pytest.mark.parametrize("verdicts", [[1] * 9, [0] * 9, [1] * 8 + [0], [0, 0, 0, 0, 1, 1, 1, 1, 1]])
def test_separable_verdicts_stay_finite(verdicts: list[float]) -> None:
    for longer in (range(-4, 5), range(9), [0] * 9):
        found = rates(verdicts, longer)
        assert all(0 <= value <= 1 for value in found.values())
        if len(set(verdicts)) == 1:
            assert found["win_rate_length_controlled"] == verdicts[0]


def test_swapping_the_sides_mirrors_every_rate() -> None:
    rng = np.random.default_rng(4)
    verdicts, longer, units = rng.choice([0.0, 0.5, 1.0], size=60), rng.normal(4, 9, size=60), np.arange(60) // 3
    ours, theirs = rates(verdicts, longer, units), rates(1 - verdicts, -longer, units)
    for key in ("win_rate", "win_rate_length_controlled"):
        assert ours[key] == pytest.approx(1 - theirs[key], abs=1e-7)
        assert ours[f"{key}_ci_low"] == pytest.approx(1 - theirs[f"{key}_ci_high"], abs=1e-7)


def test_equal_length_interval_covers_the_truth_at_its_confidence() -> None:
    rng = np.random.default_rng(5)
    truth, covered = 1 / (1 + math.exp(-0.5)), 0
    for trial in range(120):
        longer = rng.normal(10, 20, size=150)
        log_odds = 0.5 + np.tanh(longer / longer.std())
        verdicts = (rng.random(150) < 1 / (1 + np.exp(-log_odds))).astype(float)
        found = rates(verdicts, longer, confidence=0.9, draws=200, seed=trial)
        covered += found["win_rate_length_controlled_ci_low"] <= truth <= found["win_rate_length_controlled_ci_high"]
    assert 0.82 <= covered / 120 <= 0.96


def test_samples_of_a_prompt_are_resampled_together() -> None:
    values = np.repeat(np.random.default_rng(6).normal(size=30), 4)
    by_prompt = BOOTSTRAP.resample(np.repeat(np.arange(30), 4).tolist()).mean(values.tolist())
    as_if_independent = BOOTSTRAP.resample(range(120)).mean(values.tolist())
    assert by_prompt.value == pytest.approx(as_if_independent.value)
    ratio = (by_prompt.high - by_prompt.low) / (as_if_independent.high - as_if_independent.low)
    assert 1.5 < ratio < 2.6  # four copies say no more than one: twice the width


def test_ratio_of_sums() -> None:
    resamples = BOOTSTRAP.resample(range(6))
    found = resamples.mean([1.0, 4.0, 9.0] * 2, per=[1, 2, 3] * 2)
    assert found.value == 14 / 6 and 1.0 <= found.low < found.value < found.high <= 3.0
    assert found.as_metrics("entropy").keys() == {"entropy", "entropy_ci_low", "entropy_ci_high"}


@pytest.mark.parametrize("prompts", [6, 8, 16, 64])
def test_intervals_of_few_prompts_cover_the_mean_at_their_confidence(prompts: int) -> None:
    rng, covered = np.random.default_rng(prompts), 0
    for trial in range(500):
        found = replace(BOOTSTRAP, seed=trial).resample(range(prompts)).mean(rng.standard_normal(prompts).tolist())
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / 500 <= 0.98  # as they were resampled, six prompts gave 0.86


def test_few_prompts_give_their_range_or_a_wide_share_and_one_gives_no_interval() -> None:
    found = BOOTSTRAP.resample(range(3)).mean([1.0, 0.5, 1.0])
    assert (found.low, found.high) == (0.5, 1.0)
    won = rates([1.0, 0.5, 1.0], [3, 0, -2], [0, 1, 2])
    assert won["win_rate_ci_low"] < 0.2 and 0.95 < won["win_rate_ci_high"] <= 1.0
    assert "win_rate_ci_low" not in rates([1.0, 1.0], [3, 0], [0, 0])
    # Many samples of one prompt do not allow an interval.
    assert BOOTSTRAP.resample([0] * 100).mean(range(100)).as_metrics("kl") == {"kl": 49.5}
