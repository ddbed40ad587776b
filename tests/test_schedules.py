"""Schedules of alpha and beta."""

from __future__ import annotations

import math
from typing import Any

import pytest

from spo.schedules import Constant, Cosine, Linear


def test_constant() -> None:
    assert [Constant(0.3)(step) for step in (0, 7, 10**9)] == [0.3] * 3


def test_linear_hits_both_ends_and_stays_at_the_second() -> None:
    schedule = Linear(1.0, 0.2, steps=5)
    assert [schedule(step) for step in range(8)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2])
    assert [Linear(0.2, 1.0, steps=3)(step) for step in range(4)] == pytest.approx([0.2, 0.6, 1.0, 1.0])


def test_cosine_is_half_a_cosine() -> None:
    schedule = Cosine(1.0, 0.2, steps=9)
    expected = [0.6 + 0.4 * math.cos(math.pi * min(step, 8) / 8) for step in range(12)]
    assert [schedule(step) for step in range(12)] == pytest.approx(expected, rel=1e-14)
    assert schedule(4) == pytest.approx(0.6)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_a_schedule_of_one_step_starts_at_its_start(kind: Any) -> None:
    schedule = kind(1.0, 0.2, steps=1)
    assert schedule(0) == 1.0 and schedule(1) == pytest.approx(0.2)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_rising_and_falling_never_leave_the_interval(kind: Any) -> None:
    for start, end in [(0.01, 3.0), (3.0, 0.01)]:
        values = [kind(start, end, steps=100)(step) for step in range(150)]
        assert values == sorted(values, reverse=start > end)
        assert min(start, end) * (1 - 1e-12) <= min(values) and max(values) <= max(start, end) * (1 + 1e-12)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_values_must_be_positive_and_finite(bad: float) -> None:
    for name, make in {
        "value": lambda: Constant(bad),
        "start": lambda: Linear(bad, 1.0, 3),
        "end": lambda: Cosine(1.0, bad, 3),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be a positive, finite number"):
            make()
