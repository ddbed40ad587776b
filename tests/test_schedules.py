"""Schedules of alpha and beta."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hydra.utils import instantiate

from spo.config.compose import compose
from spo.config.plan import plan
from spo.errors import ConfigProblems
from spo.schedules import Constant, Cosine, Linear, PerStep


def test_constant_schedule() -> None:
    assert [Constant(0.3)(step) for step in (0, 7, 10**9)] == [0.3] * 3


def test_linear_reaches_its_end_and_stays() -> None:
    schedule = Linear(1.0, 0.2, steps=5)
    assert [schedule(step) for step in range(8)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2])
    assert [Linear(0.2, 1.0, steps=3)(step) for step in range(4)] == pytest.approx([0.2, 0.6, 1.0, 1.0])


def test_cosine_equals_its_formula() -> None:
    schedule = Cosine(1.0, 0.2, steps=9)
    expected = [0.6 + 0.4 * math.cos(math.pi * min(step, 8) / 8) for step in range(12)]
    assert [schedule(step) for step in range(12)] == pytest.approx(expected, rel=1e-14)
    assert schedule(4) == pytest.approx(0.6)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_schedule_of_one_step_starts_at_start(kind: Any) -> None:
    schedule = kind(1.0, 0.2, steps=1)
    assert schedule(0) == 1.0 and schedule(1) == pytest.approx(0.2)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_schedule_is_monotonic_between_its_ends(kind: Any) -> None:
    for start, end in [(0.01, 3.0), (3.0, 0.01)]:
        values = [kind(start, end, steps=100)(step) for step in range(150)]
        assert values == sorted(values, reverse=start > end)
        assert min(start, end) * (1 - 1e-12) <= min(values) and max(values) <= max(start, end) * (1 + 1e-12)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_schedule_values_must_be_positive_and_finite(bad: float) -> None:
    for name, make in {
        "value": lambda: Constant(bad),
        "start": lambda: Linear(bad, 1.0, 3),
        "end": lambda: Cosine(1.0, bad, 3),
        r"values\[1\]": lambda: PerStep([1.0, bad]),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be a positive, finite number"):
            make()


def test_per_step_schedule_stays_at_its_last_value() -> None:
    assert [PerStep([0.5, 0.4, 0.3])(step) for step in range(6)] == [0.5, 0.4, 0.3, 0.3, 0.3, 0.3]
    assert [PerStep([2])(step) for step in (0, 1, 99)] == [2, 2, 2]


@pytest.mark.parametrize("bad", [[], 0.5, "0.5", None])
def test_per_step_schedule_needs_a_nonempty_list(bad: Any) -> None:
    with pytest.raises(ValueError, match="values must be a list with one number per step"):
        PerStep(bad)


@pytest.mark.parametrize("bad", ["high", True, None])
def test_per_step_schedule_needs_numbers(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"values\[0\] must be a positive, finite number"):
        PerStep([bad])


@pytest.mark.parametrize("key", ["alpha", "beta"])
def test_alpha_and_beta_have_every_schedule(key: str) -> None:
    values = f"{key}=list", f"{key}.values=[0.5,0.4,0.3]"
    (job,) = plan(values).jobs
    assert [instantiate(job.cfg[key])(step) for step in range(5)] == [0.5, 0.4, 0.3, 0.3, 0.3]
    for name, kind in {"constant": Constant, "linear": Linear, "cosine": Cosine}.items():
        assert type(instantiate(compose([f"{key}={name}"])[key])) is kind


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["alpha=list"], "alpha.values is not set: a list of positive numbers, one per optimizer step"),
        (["alpha=list", "alpha.values=[]"], "alpha: values must be a list"),
        (["alpha=list", "alpha.values=0.5"], "alpha.values=0.5: must be a list"),
        (["beta=list", "beta.values=[0.1,-1]"], "beta: values[1] must be a positive, finite number, got -1"),
    ],
)
def test_config_with_a_wrong_list_is_an_error(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigProblems) as caught:
        plan(overrides)
    assert part in str(caught.value)
