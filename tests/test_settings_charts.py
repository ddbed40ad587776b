"""Charts of settings with many keys, and the importance of the keys."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from spo.comparison import importance
from spo.comparison.choice import Setting, best_setting
from spo.comparison.compare import Comparison, Method, compare
from spo.comparison.importance import Importance, importance_of_keys
from spo.comparison.runs import find_runs
from spo.pages.charts import NOT_SET, Amount, amounts, key_axis
from spo.pages.charts.keys import spreads_by_ratio
from spo.pages.comparison_page import write_page
from spo.pages.comparison_settings import settings_chart
from spo.stats import Bootstrap
from tests.comparison_runs import write_run

Values = Mapping[str, Any]


@pytest.fixture(autouse=True)
def few_shuffles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the level of chance from fewer shuffles where it is not tested."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(importance, "_SHUFFLES", 20)


def comparison_of(
    settings: Sequence[tuple[Values, float | None]], select: str = "val/win_rate"
) -> tuple[Comparison, Method]:
    """Make a comparison of one method from the values and the metric of its settings."""
    made = [Setting(f"setting {place}", values, [], metric) for place, (values, metric) in enumerate(settings)]
    method = Method("spo", "SPO", made, best_setting(made, select), {}, [])
    return Comparison([method], [], [], "eval/win_rate", True, select, None, {}, 0, [], []), method


def drawn(settings: Sequence[tuple[Values, float | None]], select: str = "val/win_rate") -> str:
    return str(settings_chart(*comparison_of(settings, select)))


def search(count: int, seed: int = 1) -> list[tuple[Values, float]]:
    """Return settings of three keys: the learning rate matters most, then beta, and alpha does not matter."""
    generator = random.Random(seed)
    found: list[tuple[Values, float]] = []
    for _ in range(count):
        lr, beta, alpha = (10 ** generator.uniform(*ends) for ends in ((-3.5, -2.5), (-2, 0), (-1.5, -0.5)))
        metric = 0.8 - 1.6 * (math.log10(lr) + 2.9) ** 2 - 0.2 * (math.log10(beta) + 1) ** 2
        found.append(
            ({"alpha.value": alpha, "beta.value": beta, "optimizer.lr": lr}, metric + generator.gauss(0, 0.005))
        )
    return found


def lines_of(chart: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Return the classes and corners of the lines in parallel coordinates."""
    found = re.findall(r'<polyline class="setting ([^"]+)" points="([^"]+)"', chart)
    return [(look, [tuple(map(float, at.split(","))) for at in points.split()]) for look, points in found]  # type: ignore[misc]


# --- axes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((0.03, 0.1, 0.3), True),
        ((1, 2, 4, 8), True),
        ((0.02, 0.05, 0.1), True),
        ((0.001, 0.1), True),
        ((0.1, 0.5, 0.6), False),
        (tuple(0.01 + place / 40 for place in range(40)), False),  # even, though it spans two powers of ten
        (tuple(10 ** (place / 20) for place in range(12)), True),  # even in its logarithms, over half of one
        ((1, 2), False),
        ((1, 2, 3, 4, 5, 6, 7, 8, 9), False),
        ((0, 0.1, 10), False),
        ((-1, 100), False),
        ((0.5,), False),
    ],
)
def test_numbers_that_spread_by_ratio_have_a_logarithmic_axis(numbers: tuple[float, ...], expected: bool) -> None:
    assert spreads_by_ratio(numbers) is expected


def test_equal_ratios_have_equal_distances_on_a_logarithmic_axis() -> None:
    axis = key_axis("beta", [1.0, 0.01, 0.1, 0.1])
    assert axis.numbers == (0.01, 0.1, 1.0) and axis.logarithmic
    low, middle, high = (axis.place(number) for number in axis.numbers)
    assert middle - low == pytest.approx(high - middle) and 0 < low < high < 1
    even = key_axis("n", [1, 2, 3])
    assert even.place(2) == pytest.approx((even.place(1) + even.place(3)) / 2)
    assert [text for _, text in even.ticks(0.05)] == ["1", "2", "3"]


def test_values_without_a_number_have_lanes_before_the_numbers() -> None:
    axis = key_axis("w", [16, NOT_SET, 64, None, "spo.schedules.Linear", True, math.nan])
    assert axis.lanes == (NOT_SET, "Linear", "None", "True", "nan") and axis.numbers == (16, 64)
    places = [axis.place(value) for value in (NOT_SET, "spo.schedules.Linear", None, True, math.nan, 16, 64)]
    assert places == sorted(places) and len(set(places)) == 7 and places[0] > 0 and places[-1] < 1
    names = key_axis("name", ["b", "a", "a"])
    assert [names.place(name) for name in "ab"] == [0.25, 0.75] and not names.numbers


def test_ticks_of_many_numbers_are_round_and_apart() -> None:
    for numbers in ([10 ** (-4 + place / 13) for place in range(40)], [3.0 + place / 7 for place in range(40)]):
        axis = key_axis("k", numbers)
        ticks = axis.ticks(0.08)
        assert 2 <= len(ticks) <= 13
        assert all(after - before >= 0.0799 for (before, _), (after, _) in pairwise(ticks))
        assert all(place == pytest.approx(axis.place(float(text))) for place, text in ticks)


# --- charts --------------------------------------------------------------------------------------------------------


def test_three_keys_are_parallel_coordinates() -> None:
    settings = search(14)
    chart = drawn(settings)
    lines = lines_of(chart)
    assert len(lines) == 14 and {len(corners) for _, corners in lines} == {4}
    assert [x for x, _ in lines[0][1]] == pytest.approx([74 + i * (1000 - 148) / 3 for i in range(4)], abs=0.1)
    # A larger value is higher up, on every axis. The last line is the best one.
    best = max(settings, key=lambda one: one[1])
    for axis in range(4):
        heights = sorted((corners[axis][1] for _, corners in lines), reverse=True)
        values = sorted([*one[0].values(), one[1]][axis] for one in settings)
        place = values.index([*best[0].values(), best[1]][axis])
        assert lines[-1][1][axis][1] == heights[place]
    assert lines[-1][0] == "selected hue-1" and chart.count("setting selected") == 1
    assert all(re.fullmatch("ramp-[0-6]", look) for look, _ in lines[:-1])
    # Lines are in the order of the metric, with the color that belongs to it.
    ranks = [int(look[-1]) for look, _ in lines[:-1]]
    assert ranks == sorted(ranks) and ranks[0] == 0 and len(set(ranks)) > 2
    ends = [corners[-1][1] for _, corners in lines]
    assert ends == sorted(ends, reverse=True)
    assert chart.count("> log</tspan>") == 3 and chart.count('class="over-key"') == 3
    assert "hue-" not in "".join(look for look, _ in lines[:-1])  # no method's color stands for a quantity


def test_less_may_be_better() -> None:
    settings = [(values, 1 - metric) for values, metric in search(12)]
    chart = drawn(settings, "val/kl")
    lines = lines_of(chart)
    ranks = [int(look[-1]) for look, _ in lines[:-1]]
    assert ranks == sorted(ranks) and ranks[0] == 0
    ends = [corners[-1][1] for _, corners in lines]
    assert ends == sorted(ends) and ends[-1] == max(ends)  # the best one has the smallest value


@pytest.mark.parametrize("keys", [3, 4, 5, 6])
def test_chart_of_keys_that_only_some_settings_have(keys: int) -> None:
    generator = random.Random(keys)
    settings: list[tuple[Values, float | None]] = []
    for place in range(100):
        values: dict[str, Any] = {"alpha.value": generator.choice([0.1, 0.2, 0.5]), "name": generator.choice("xyz")}
        values["list"] = generator.choice([[1, 2], [3], None])
        values |= {f"group.key_{i}": generator.random() for i in range(keys - 3) if generator.random() < 0.7}
        settings.append((values, None if place == 7 else generator.random()))
    chart = drawn(settings)
    lines = lines_of(chart)
    assert len(lines) == 100 and {len(corners) for _, corners in lines} == {keys, keys + 1}
    assert lines[0][0] == "unknown" and len(lines[0][1]) == keys  # without the metric, it ends before the last axis
    assert chart.count('class="over-key"') == keys and (NOT_SET in chart) is (keys > 3)
    assert "nan" not in chart.lower().replace("nannan", "") and "[1, 2]" in chart
    for svg in re.findall(r'<svg class="over-key".*?</svg>', chart, re.S):
        assert svg.count('<path class="mark hue-1') == 99


def test_metric_over_a_key_has_a_mark_for_each_setting() -> None:
    settings = [({"a": a, "b": b, "c": 0.5 * a * b}, a + b / 10) for a in (1, 2, 3) for b in (1, 2, 3)]
    charts = re.findall(r'<svg class="over-key".*?</svg>', drawn(settings), re.S)
    for svg, key in zip(charts, "abc", strict=True):
        at = [tuple(map(float, one)) for one in re.findall(r"translate\(([\d.]+) ([\d.]+)\)", svg)]
        assert len(at) == 9 and svg.count('class="ring"') == 1
        values = sorted({one[0][key] for one in settings})
        columns = sorted({x for x, _ in at})
        assert len(columns) == len(values)
        assert sorted(x for x, _ in at) == [
            columns[values.index(value)] for value in sorted(one[0][key] for one in settings)
        ]
        assert sorted(y for _, y in at)[0] == at[-1][1]  # the best is drawn last, and highest


def test_grid_of_two_keys_is_a_map_and_a_search_is_not() -> None:
    generator = random.Random(1)
    grid = [({"a": a, "b": b}, a * b) for a in (1, 2) for b in (1, 2)]
    assert 'class="tiles"' in drawn(grid) and "parallel" not in drawn(grid)
    chart = drawn([({"a": generator.random(), "b": generator.random()}, generator.random()) for _ in range(20)])
    assert 'class="parallel"' in chart and chart.count('class="over-key"') == 2 and "tiles" not in chart
    assert "mportance" not in chart
    many = drawn([({"a": generator.random()}, generator.random()) for _ in range(40)])
    assert many.count('class="over-key"') == 1 and "parallel" not in many


def test_nothing_is_drawn_of_one_setting_or_without_a_metric() -> None:
    values = {"a": 1, "b": 2, "c": 3}
    assert settings_chart(*comparison_of([(values, 0.5)])) is None
    assert settings_chart(*comparison_of([(values, None), ({**values, "a": 2}, None)])) is None
    chart = drawn([(values, 0.5), ({**values, "a": 2}, 0.5)])  # equal results
    assert len(lines_of(chart)) == 2 and "needs at least 12 settings; there are 2" in chart


def test_hostile_values_are_escaped() -> None:
    chart = drawn([({"a<b>": "<script>", "b": i, "c": i, "long." + "x" * 60: i}, i) for i in range(3)])
    assert "<script>" not in chart and "&lt;script&gt;" in chart and "<b>" not in chart
    assert "…" + "x" * 10 in chart


# --- importance ----------------------------------------------------------------------------------------------------


def importances(settings: Sequence[tuple[Values, float]], **options: Any) -> list[Importance]:
    keys = {key for values, _ in settings for key in values}
    found = importance_of_keys(
        [values for values, _ in settings],
        [metric for _, metric in settings],
        {key: key.startswith(("alpha", "beta", "optimizer")) for key in keys},
        **{"higher": True, **options},
    )
    assert not isinstance(found, str), found
    return found


def test_importance_finds_the_keys_that_matter() -> None:
    pytest.importorskip("optuna")
    found = importances(search(60))
    assert [one.key for one in found] == ["optimizer.lr", "beta.value", "alpha.value"]
    assert sum(one.share for one in found) == pytest.approx(1)
    assert found[0].share > 0.6 and found[0].beyond_chance and not found[-1].beyond_chance
    grid = [({"a": a, "b": b, "c": c}, a + 2 * b) for a in range(4) for b in range(4) for c in range(3)]
    assert [one.key for one in importances(grid)] == ["b", "a", "c"]
    assert importances(search(60)) == found  # the same, whenever it is computed
    turned = [(values, -metric) for values, metric in search(60)]
    assert importances(turned, higher=False) == found
    assert importances(turned)[0].share != found[0].share  # the worse half is another question


def test_importance_of_names_and_of_keys_that_some_settings_lack() -> None:
    pytest.importorskip("optuna")
    generator, settings = random.Random(3), []
    for place in range(40):
        values: dict[str, Any] = {"name": "xyz"[place % 3], "other": generator.choice("pq")}
        if place % 2:
            values["only"] = 5  # one value, or none
        settings.append((values, (place % 3 == 0) + 0.1 * generator.random()))
    found = importances(settings)
    assert found[0].key == "name" and found[0].share > 0.8 and {one.key for one in found} == {"name", "other", "only"}
    present = importances([(values, float("only" in values) + 0.01 * generator.random()) for values, _ in settings])
    assert present[0].key == "only" and present[0].beyond_chance


def test_keys_with_equal_effects_are_equally_important() -> None:
    pytest.importorskip("optuna")
    grid = [({"a": a, "b": b, "c": c}, a + b) for a in range(4) for b in range(4) for c in (0, 1)]
    found = {one.key: one.share for one in importances(grid)}
    assert found["a"] == pytest.approx(found["b"]) and found["c"] < 0.1


@pytest.mark.slow
def test_noise_is_not_called_important() -> None:
    pytest.importorskip("optuna")
    generator = random.Random(5)
    flagged = sum(
        one.beyond_chance
        for _ in range(5)
        for one in importances([({k: generator.random() for k in "abc"}, generator.random()) for _ in range(24)])
    )
    assert flagged <= 3  # of fifteen, each with a chance of one in twenty


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (search(11), "3 keys needs at least 12 settings; there are 11"),
        ([({k: i for k in "abcdef"}, i) for i in range(23)], "6 keys needs at least 24 settings; there are 23"),
        ([(values, 0.5) for values, _ in search(12)], "all settings have the same value"),
    ],
)
def test_importance_is_not_invented(settings: list[tuple[Values, float]], words: str) -> None:
    keys = dict.fromkeys(settings[0][0], False)
    found = importance_of_keys([v for v, _ in settings], [m for _, m in settings], keys, higher=True)
    assert isinstance(found, str) and words in found
    assert words in drawn(settings) and 'class="amounts"' not in drawn(settings)


def test_importance_without_optuna_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance.importlib.util, "find_spec", lambda name: None)
    assert "optuna is not installed: pip install &#39;spo[optuna]&#39;" in drawn(search(12))


def test_importance_is_drawn_as_bars_with_numbers() -> None:
    pytest.importorskip("optuna")
    chart = drawn(search(40))
    [bars] = re.findall(r'<svg class="amounts".*?</svg>', chart, re.S)
    widths = [float(width) for width in re.findall(r'class="amount hue-1[^>]* width="([\d.]+)"', bars)]
    values = [float(value) for value in re.findall(r'class="row-value"[^>]*>([\d.]+)<', bars)]
    assert len(widths) == len(values) == 3 and values == sorted(values, reverse=True)
    assert widths[1] / widths[0] == pytest.approx(values[1] / values[0], abs=0.02)
    assert "optimizer.lr" in bars and "PED-ANOVA" in chart


def test_bars_have_a_mark_and_a_large_mark_stays_inside() -> None:
    bars = str(amounts([Amount("a", 0.8, 0.4, "said a"), Amount("b", 0.2, 9.0, "said b", faint=True)], 2, "share"))
    first, second = (float(x) for x in re.findall(r'class="of-chance" x1="([\d.]+)"', bars))
    (start, width), (_, small) = (
        tuple(map(float, one))
        for one in re.findall(r'class="amount hue-2[^"]*" x="([\d.]+)".*? width="([\d.]+)"', bars)
    )
    assert first == pytest.approx(start + width / 2, abs=0.2) and small == pytest.approx(width / 4, abs=0.2)
    assert start + width < second <= 460 - 58 and bars.count("faint") == 1


def test_page_shows_settings_of_three_keys(tmp_path: Path) -> None:
    for place, (values, metric) in enumerate(search(12)):
        run = write_run(
            tmp_path / str(place), alpha=values["alpha.value"], beta=values["beta.value"], lift=3 * metric, prompts=8,
            changes={"optimizer.lr": values["optimizer.lr"]},
        )  # fmt: skip
        assert run.is_dir()
    comparison = compare(find_runs([tmp_path]), bootstrap=Bootstrap(draws=50))
    page = write_page(comparison, tmp_path / "comparison").read_text()
    assert len(lines_of(page)) == 12 and "Settings tried" in page
    best = comparison.methods[0].best
    assert f"selected · {best.label}" in page and "optimizer.lr" in page
