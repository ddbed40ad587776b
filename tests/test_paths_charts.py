"""Charts of win rate and KL over the training steps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from spo.comparison.compare import Comparison, compare
from spo.comparison.runs import find_runs
from spo.pages.comparison_figures import hues
from spo.pages.comparison_page import write_page
from spo.pages.comparison_paths import KL, WIN_RATE, path_curves, paths_chart
from spo.stats import Bootstrap
from tests.comparison_runs import write_run
from tests.test_reports import Page

# KL and win rate by step.
Path_ = Mapping[int, tuple[float | str, float | str]]
RISING: Path_ = {0: (0.0, 0.5), 10: (0.1, 0.6), 20: (1.0, 0.7), 30: (10.0, 0.65)}


def comparison_of(folder: Path, paths: Mapping[str, Sequence[Path_]]) -> Comparison:
    """Compare runs with given samples at validations, one per method and seed."""
    for method, seeds in paths.items():
        for seed, path in enumerate(seeds):
            run = write_run(folder, method=method, seed=seed, prompts=6)
            rows = [
                {"step": step, KL: kl, WIN_RATE: win, "val/entropy": 1.0 + step} for step, (kl, win) in path.items()
            ]
            (run / "history.jsonl").write_text("".join(json.dumps(row).replace('"NaN"', "NaN") + "\n" for row in rows))
    return compare(find_runs([folder]), bootstrap=Bootstrap(draws=20))


def marks(chart: str, hue: int) -> list[tuple[float, float, float, str]]:
    """Return position, size and look of the marks of a color."""
    found = re.findall(
        rf'class="mark hue-{hue} (\w*)" transform="translate\(([\d.]+) ([\d.]+)\) scale\(([\d.]+)\)"', chart
    )
    return [(float(x), float(y), float(size), look) for look, x, y, size in found]


def ticks(chart: str) -> dict[str, float]:
    return {
        text: float(x) for x, text in re.findall(r'text-anchor="middle" x="([\d.]+)" y="\d+">([\d.]+)</text>', chart)
    }


def test_path_goes_from_its_start_to_its_end(tmp_path: Path) -> None:
    chart = str(paths_chart(comparison_of(tmp_path, {"dpo": [RISING]})))
    [line] = re.findall('<polyline class="curve frontier hue-1" points="([^"]+)"', chart)
    corners = [tuple(map(float, at.split(","))) for at in line.split()]
    assert len(corners) == 4 and [x for x, _ in corners] == sorted(x for x, _ in corners)
    heights = [y for _, y in corners]
    assert heights[1] - heights[2] == pytest.approx(heights[0] - heights[1], abs=0.11)
    assert heights[3] == pytest.approx((heights[1] + heights[2]) / 2, abs=0.11)
    # Equal ratios of the KL have equal distances, though the start has none at all.
    assert corners[3][0] - corners[2][0] == pytest.approx(corners[2][0] - corners[1][0], abs=0.11)
    assert "logarithmic scale" in chart and corners[0][0] == pytest.approx(ticks(chart)["0"], abs=0.11)
    looks = {(x, y): (size, look) for x, y, size, look in marks(chart, 1)}
    assert [looks[corner] for corner in corners] == [(5.2, "hollow"), (3.2, "faint"), (3.2, "faint"), (5.2, "")]
    for step, words in ((0, "KL 0"), (20, "KL 1"), (30, "KL 10")):
        assert re.search(rf"dpo\nstep {step}, one seed\nwin rate [\d.]+\n{words}(\.0+)?</title>", chart)


def test_path_is_a_mean_over_seeds_at_steps_that_all_of_them_have(tmp_path: Path) -> None:
    other: Path_ = {0: (0.0, 0.5), 10: (0.3, 0.8), 20: ("NaN", 0.9), 40: (5.0, 0.9)}
    comparison = comparison_of(tmp_path, {"dpo": [RISING, other], "spo": [RISING, RISING]})
    chart = str(paths_chart(comparison))
    hue = hues(comparison)
    assert len(marks(chart, hue["dpo"])) == 2 and len(marks(chart, hue["spo"])) == 4
    assert "dpo\nstep 10, mean of 2 seeds\nwin rate 0.700\nKL 0.200" in chart
    assert "dpo\nstep 20" not in chart and "dpo\nstep 40" not in chart
    same = [marks(chart, hue["spo"])[i][:2] for i in (0, 1)]
    assert same[0] != same[1]


def test_equal_paths_lie_on_each_other(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, {"dpo": [RISING], "ipo": [RISING]})
    chart, hue = str(paths_chart(comparison)), hues(comparison)
    assert marks(chart, hue["dpo"]) == marks(chart, hue["ipo"]) != []


def test_nothing_is_drawn_without_a_path(tmp_path: Path) -> None:
    comparison = comparison_of(tmp_path, {"dpo": [{0: (0.0, 0.5)}], "ipo": [{}]})
    assert paths_chart(comparison) is None and path_curves(comparison) == ([], [])
    page = Page(write_page(comparison, tmp_path / "comparison"))
    assert "Over training" not in page.text


def test_curves_over_steps_have_bands_over_seeds(tmp_path: Path) -> None:
    higher: Path_ = {step: (3 * float(kl), 0.1 + float(win)) for step, (kl, win) in RISING.items()}
    comparison = comparison_of(tmp_path, {"dpo": [RISING, higher], "spo": [RISING, RISING]})
    [group], data = path_curves(comparison)
    assert [chart["panel"].unit for chart in group["charts"]] == ["share of prompts", "nats per sequence"]
    assert [one["key"] for one in data] == [WIN_RATE, KL]
    for one, expected in zip(data, ([0.55, 0.65, 0.75, 0.7], [0.0, 0.2, 2.0, 20.0]), strict=True):
        drawn = {series["name"]: series for series in one["series"]}
        assert drawn["dpo"]["values"] == pytest.approx(expected) and drawn["dpo"]["steps"] == [0, 10, 20, 30]
        assert {name: series["hue"] for name, series in drawn.items()} == hues(comparison)
    assert all(str(chart["svg"]).count('<polygon class="band') == 2 for chart in group["charts"])
    page = Page(write_page(comparison, tmp_path / "comparison"))
    # Charts are found by position: the page has those of the paths first, and does not repeat them below.
    keys = [attributes["data-chart"] for tag, attributes in page.elements if "data-chart" in attributes]
    assert keys == [chart["key"] for chart in page.all_charts] and keys == [WIN_RATE, KL, "val/entropy"]
    assert keys.count(WIN_RATE) == keys.count(KL) == 1 and not [key for key in keys if "_ci_" in key]
    assert "Over training" in page.text and "the hollow mark is the start" in page.text
