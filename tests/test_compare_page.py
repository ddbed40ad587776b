"""The comparison page: one file that draws the results, in Python and in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spo.comparison.compare import Comparison, compare
from spo.comparison.runs import find_runs
from spo.metrics.catalogue import comparable
from spo.pages.charts import HUES, Cloud, LineChart, Point, Series, Whisker, line_chart, marker, scatter, whiskers
from spo.pages.comparison_figures import frontier, hues, win_matrix
from spo.pages.comparison_page import write_page
from spo.pages.comparison_settings import settings_chart
from spo.stats import Bootstrap
from spo.wording import number
from tests.comparison_runs import write_run, write_sweep
from tests.test_reports import HOSTILE, Page

if TYPE_CHECKING:
    from playwright.sync_api import Browser

QUICK = Bootstrap(draws=300)
SECONDS = {"time/train_s": 12.0}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    folder = write_sweep(tmp_path_factory.mktemp("grid"), grid=True, seeds=(1, 2), prompts=24, trained=SECONDS)
    comparison = compare(find_runs([folder]), bootstrap=QUICK)
    return comparison, write_page(comparison, folder / "comparison")


def page_of(folder: Path, **options: Any) -> Page:
    return Page(write_page(compare(find_runs([folder]), bootstrap=QUICK, **options), folder / "comparison"))


def test_comparison_page_is_one_file_that_runs_only_its_own_script(grid: tuple[Comparison, Path]) -> None:
    page = Page(grid[1])
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "xlink:href"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.source and "@import" not in page.source
    script = page.data["script"][-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [one["content"] for tag, one in page.elements if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert len(page.source) < 1_000_000
    assert "prefers-color-scheme: dark" in page.source and "@media print" in page.source


def test_comparison_page_shows_the_results(grid: tuple[Comparison, Path]) -> None:
    comparison, path = grid
    page = Page(path)
    assert "27 settings · 2 seeds · 24 test prompts · selected by val/win_rate" in page.text
    for method in comparison.methods:
        one = method.estimates["win_rate"]
        trained = f"60 steps, 1,920 pairs 12.00 {'38,400' if method.name == 'spo' else '0'}"
        assert (
            f"{method.name} {method.best.label} 9 2 {trained} {one.value:.3f} [{number(one.low)}, {number(one.high)}]"
            in page.text
        )
    for difference in comparison.differences:
        found = "significant" if difference.significant else "no difference shown"
        assert f"{difference.first} − {difference.second} {difference.estimate.value:+.3}"[:14] in page.text
        assert found in page.text
    assert "not a fair comparison" not in page.text
    assert page.text.count("But it was lost.") == 6 * 4  # six prompts, three methods and the reference


def test_numbers_of_the_reference_stand_below_those_of_the_methods(grid: tuple[Comparison, Path]) -> None:
    comparison, path = grid
    (table,) = re.findall(r'<table[^>]* id="table">(.*?)</table>', path.read_text(), re.S)
    head, *_, foot = rows = [
        re.findall(r"<t[hd][ >].*?</t[hd]>", row, re.S) for row in re.findall(r"<tr>.*?</tr>", table, re.S)
    ]
    assert len(rows) == 5 and {len(row) for row in rows} == {len(head)}
    (place,) = (number for number, cell in enumerate(head) if "KL to the reference" in cell)
    assert foot[place] == '<td class="num">0</td>' and comparison.reference["kl"] == 0


def test_frontier_draws_a_point_per_run_and_a_line_per_method(grid: tuple[Comparison, Path]) -> None:
    comparison, path = grid
    for cost in ("kl", "entropy"):
        drawn = str(frontier(comparison, cost))
        assert len(re.findall(r'class="mark hue-\d faint"', drawn)) == 54
        assert len(re.findall(r'class="mark hue-\d "', drawn)) == 27
        assert drawn.count('class="ring"') == 3 and "the reference model" in drawn
        lines = re.findall(r'<polyline class="curve frontier hue-\d" points="([^"]*)"', drawn)
        assert 1 <= len(lines) <= 3
        for line in lines:  # along it both the cost and the gain grow
            corners = [tuple(map(float, corner.split(","))) for corner in line.split()]
            sign = 1 if cost == "kl" else -1
            assert all(a[1] >= b[1] and sign * a[0] <= sign * b[0] for a, b in pairwise(corners))
        assert drawn in path.read_text(encoding="utf-8")


def test_settings_chart_is_a_map_of_two_keys_or_a_list_of_one(grid: tuple[Comparison, Path]) -> None:
    comparison, _ = grid
    charts = {method.name: str(settings_chart(comparison, method)) for method in comparison.methods}
    assert charts["spo"].count('<rect class="tile quantity"') == 9 and charts["spo"].count("tile-edge") == 1
    best = next(method for method in comparison.methods if method.name == "spo").best
    assert f"selected · {best.label} · 2 seeds" in charts["spo"]
    for name in ("dpo", "ipo"):
        assert len(re.findall("beta [0-9.]+( ✓)?</text>", charts[name])) == 9 and charts[name].count("✓") == 1


def test_win_matrix_has_a_cell_for_every_pair(grid: tuple[Comparison, Path]) -> None:
    comparison, _ = grid
    drawn = str(win_matrix(comparison))
    assert len(re.findall(r'<rect class="tile hue-\d"', drawn)) == 6 and drawn.count("95% interval") == 6
    colors = re.findall(r'<rect class="tile hue-(\d)".*?<title>(\w+) against (\w+)', drawn)
    won = {(one.first, one.second): one.estimate.value for one in comparison.duels if one.estimate is not None}
    for color, row, column in colors:  # the color of whoever wins more often
        assert int(color) == hues(comparison)[row if won[row, column] >= 0.5 else column]
    for duel in comparison.duels:
        assert f"{duel.first} against {duel.second}\nwin rate" in drawn


def test_curves_of_the_dashboard_are_means_in_bands(grid: tuple[Comparison, Path]) -> None:
    comparison, path = grid
    page = Page(path)
    shared = {key: chart for key, chart in page.charts.items() if comparable(key)}
    assert set(shared) == {"val/kl", "val/entropy", "val/rewards/accuracies"} | {
        f"train/{name}" for name in ("logps/chosen", "logps/rejected", "grad_norm")
    }
    order = [method.name for method in comparison.methods]
    for key, chart in shared.items():
        assert [one["name"] for one in chart["series"]] == order
        assert [one["hue"] for one in chart["series"]] == [hues(comparison)[name] for name in order]
        runs = comparison.methods[0].best.runs
        curves = [dict(zip(*run.record.curve(key), strict=True)) for run in runs]
        first = chart["series"][0]
        assert first["values"] == pytest.approx([sum(c[s] for c in curves) / 2 for s in first["steps"]], rel=1e-5)
    assert path.read_text().count('<polygon class="band') == 3 * len({*shared, "val/loss", "val/rewards/margins"})


def test_losses_and_implicit_rewards_of_methods_do_not_share_axes(grid: tuple[Comparison, Path]) -> None:
    comparison, path = grid
    drawn = Page(path).all_charts
    for key in ("val/loss", "val/rewards/margins"):
        charts = [chart for chart in drawn if chart["key"] == key]
        assert [[one["name"] for one in chart["series"]] for chart in charts] == [[m.name] for m in comparison.methods]
        assert [chart["series"][0]["hue"] for chart in charts] == [hues(comparison)[m.name] for m in comparison.methods]
    for heading, method in (("Loss", "ipo"), ("Implicit reward margin", "spo")):
        assert re.search(rf"<h4>{heading}, {method} <span", path.read_text())
    # Each has the axis that fits its own numbers.
    [margin] = re.findall(r"<h4>Implicit reward margin, spo .*?</figure>", path.read_text(), re.S)
    assert margin.count('<path class="curve') == 1
    assert all(len(chart["series"]) == 1 for chart in drawn if not comparable(chart["key"]))


def test_seed_without_a_finite_value_leaves_a_gap_in_the_mean(tmp_path: Path) -> None:
    for seed, values in ((1, [1.0, 2.0, 3.0]), (2, [3.0, "NaN", 5.0])):
        run = write_run(tmp_path, method="dpo", seed=seed)
        rows = [f'{{"step": {step}, "val/kl": {value}}}\n' for step, value in zip((1, 2, 3), values, strict=True)]
        (run / "history.jsonl").write_text("".join(rows))
    page = page_of(tmp_path)
    assert page.charts["val/kl"]["series"][0]["values"] == [2.0, None, 4.0]


def test_comparison_page_states_what_is_absent(tmp_path: Path) -> None:
    write_run(tmp_path, method="dpo", judge=False)
    write_run(tmp_path, method="ipo", judge=False)
    for run in tmp_path.glob("method-*"):
        (run / "history.jsonl").write_text("")
    page = page_of(tmp_path, metric="eval/kl")
    assert "The methods were not judged against each other" in page.text
    assert 'spo evaluate RUN judge=JUDGE "evaluation.against=[OTHER_RUN]"' in page.text
    assert "No step was logged, so there are no curves." in page.text and not page.charts
    for run in tmp_path.glob("method-*"):
        (run / "samples.jsonl").unlink()
    assert "The runs do not have samples for the same prompts." in page_of(tmp_path, metric="eval/kl").text


def test_comparison_of_one_method_has_no_differences(tmp_path: Path) -> None:
    for beta in (0.1, 0.2):
        write_run(tmp_path, method="dpo", beta=beta)
    page = page_of(tmp_path)
    assert "Differences" not in page.text and "Head to head" not in page.text and "Settings tried" in page.text


def test_comparison_page_escapes_hostile_texts(tmp_path: Path) -> None:
    for name in ("dpo", "<b>x</b>"):
        run = write_run(tmp_path, method="other" if name != "dpo" else name, changes={"method.title": HOSTILE})
        identity = json.loads((run / "identity.json").read_text())
        identity["config"]["method.name"] = name
        (run / "identity.json").write_text(json.dumps(identity))
        rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        for row in rows:
            row |= {"completion": HOSTILE, "prompt": HOSTILE, "reference_completion": HOSTILE}
        (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(tmp_path)
    assert not [tag for tag, _ in page.elements if tag in ("img", "iframe")]
    assert len(page.data["script"]) == 2 and "{{ 7 * 7 }}" in page.text and "<b>x</b>" in page.text


# --- drawing -------------------------------------------------------------------------------------------------------


def test_marks_of_different_colors_have_different_shapes() -> None:
    shapes = {marker(hue, 0, 0, 1).partition(' d="')[2] for hue in range(1, 1 + HUES)}
    assert len(shapes) == HUES


def test_scatter_places_points_by_their_numbers() -> None:
    points = [Point(0.0, 0.0, "low"), Point(10.0, 1.0, "high"), Point(5.0, 0.5, "middle")]
    drawn = str(scatter([Cloud("a", 1, points, [(0.0, 0.0), (10.0, 1.0)])], "cost", "gain"))
    at = [tuple(map(float, pair)) for pair in re.findall(r"translate\(([\d.]+) ([\d.]+)\)", drawn)]
    assert at[2] == pytest.approx(((at[0][0] + at[1][0]) / 2, (at[0][1] + at[1][1]) / 2), abs=0.1)
    assert at[0][0] < at[1][0] and at[0][1] > at[1][1]
    [line] = re.findall('points="([^"]*)"', drawn)
    assert line == " ".join(f"{x},{y}" for x, y in at[:2])
    assert str(scatter([Cloud("a", 1, points[:1])], "cost", "gain")).count("<path") == 1


def places(drawn: str) -> list[float]:
    return [float(x) for x in re.findall(r"translate\(([\d.]+) [\d.]+\)", drawn)]


def ticks_of(drawn: str) -> list[str]:
    return re.findall(r'text-anchor="middle" x="[\d.]+" y="\d+">([^<]+)</text>', drawn)


def test_spread_costs_are_drawn_on_a_logarithmic_axis() -> None:
    costs = [0.5, 1.0, 2.0, 4.0, 200.0]
    points = [Point(x, 0.5, "run") for x in costs]
    drawn = str(scatter([Cloud("a", 1, points)], "KL", "win rate", (0.0, 0.5), stretched=True))
    steps = [after - before for before, after in pairwise(places(drawn))]
    assert steps[:3] == pytest.approx([steps[0]] * 3, abs=0.2)  # equal ratios, equal distances
    assert places(drawn)[3] - places(drawn)[0] > 100  # of 462; on a plain axis they would be eight units apart
    assert "KL (logarithmic scale)" in drawn and {"0", "1", "10", "100"} <= set(ticks_of(drawn))
    plain = str(scatter([Cloud("a", 1, points)], "KL", "win rate", (0.0, 0.5)))
    assert "scale)" not in plain and places(plain)[3] - places(plain)[0] < 10
    even = str(scatter([Cloud("a", 1, [Point(x, 0.5, "run") for x in (1.0, 2.0, 4.0)])], "KL", "gain", stretched=True))
    assert "scale)" not in even


@pytest.mark.parametrize("lowest", [0.0, -0.01])
def test_costs_without_a_logarithm_are_drawn_on_a_square_root_axis(lowest: float) -> None:
    points = [Point(x, 0.5, "run") for x in (lowest, 1.0, 4.0, 9.0, 100.0)]
    drawn = str(scatter([Cloud("a", 1, points)], "KL", "win rate", stretched=True))
    at = places(drawn)
    assert at == sorted(at) and "KL (square-root scale)" in drawn
    assert at[3] - at[2] == pytest.approx(at[2] - at[1], abs=0.2) and at[4] - at[3] > 6 * (at[3] - at[2])


def test_numbers_beyond_a_sensible_range_do_not_stretch_the_axis() -> None:
    points = [Point(x, 0.5, "run") for x in (1e-12, 1.0, 2.0, 100.0)]
    at = places(str(scatter([Cloud("a", 1, points)], "KL", "win rate", stretched=True)))
    assert at[3] - at[1] > 150 and at[0] < at[1]


def test_whiskers_reach_from_low_to_high() -> None:
    rows = [Whisker("a", 1, 0.5, 0.25, 0.75, "said a"), Whisker("b", 2, 0.9, None, None, "said b")]
    drawn = str(whiskers(rows, "win rate", (0.0, 1.0), 0.5))
    [(x, width)] = re.findall(r'class="interval hue-1" x="([\d.]+)" y="[\d.]+" rx="3" width="([\d.]+)"', drawn)
    ticks = {float(text): float(at) for at, text in re.findall(r'x="([\d.]+)" y="\d+">([\d.]+)</text>', drawn)}
    assert float(x) == pytest.approx(ticks[0.25], abs=0.11)
    assert float(x) + float(width) == pytest.approx(ticks[0.75], abs=0.11)


def test_band_lies_around_its_line() -> None:
    series = Series(
        "a", [0, 1, 2], [1.0, float("nan"), 3.0], low=[0.0, float("nan"), 2.0], high=[2.0, float("nan"), 4.0]
    )
    drawn = str(line_chart(LineChart("k", "t", "", [series]), (0, 2))[0])
    [edge] = re.findall('<polygon class="band hue-1" points="([^"]*)"', drawn)
    corners = [tuple(map(float, corner.split(","))) for corner in edge.split()]
    line = [tuple(map(float, at)) for at in re.findall(r'circle class="dot hue-1" cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert len(corners) == 4
    assert line[0][1] == pytest.approx((corners[0][1] + corners[3][1]) / 2, abs=0.11)
    assert line[1][1] == pytest.approx((corners[1][1] + corners[2][1]) / 2, abs=0.11)


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox", "--disable-gpu"])
        yield one
        one.close()


@pytest.mark.browser
@pytest.mark.parametrize("look", ["light", "dark", "narrow", "print"])
def test_browser_shows_the_comparison_page(
    grid: tuple[Comparison, Path], browser: Browser, tmp_path: Path, look: str
) -> None:
    width = {"narrow": 400, "print": 720}.get(look, 1280)  # a sheet of A4 has 720 pixels between its margins
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme="dark" if look == "dark" else "light"
    )
    output: list[str] = []
    page.on("console", lambda message: output.append(message.text))
    page.on("pageerror", lambda error: output.append(str(error)))
    page.on("request", lambda request: output.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(grid[1].as_uri())
    if look == "print":
        page.emulate_media(media="print")
    page.screenshot(path=tmp_path / f"comparison-{look}.png", full_page=True)
    assert not output
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    boxes = page.evaluate("[...document.querySelectorAll('svg')].map((one) => one.getBoundingClientRect().toJSON())")
    assert all(box["width"] > 8 and box["height"] > 8 and box["right"] <= width + 1 for box in boxes)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(20, 23, 27)") is (look == "dark")
    page.close()


@pytest.mark.browser
def test_table_sorts_and_figures_respond_to_the_pointer(grid: tuple[Comparison, Path], browser: Browser) -> None:
    comparison, path = grid
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(path.as_uri())

    def order() -> list[str]:
        return [text.strip() for text in page.locator("#table tbody th").all_inner_texts()]

    def by(key: str) -> list[str]:
        return [m.name for m in sorted(comparison.methods, key=lambda m: m.estimates[key].value)]

    heads = page.locator("#table thead th")
    assert order() == by("win_rate")[::-1]
    for name, key in (("KL to the reference", "kl"), ("entropy", "entropy")):
        head = heads.filter(has_text=name)
        head.get_by_role("button").click()
        assert order() == by(key)[::-1] and head.get_attribute("aria-sort") == "descending"
        head.get_by_role("button").press("Enter")
        assert order() == by(key) and head.get_attribute("aria-sort") == "ascending"
    heads.filter(has_text="method").get_by_role("button").click()
    assert order() == ["dpo", "ipo", "spo"]
    assert page.locator('th[aria-sort="ascending"], th[aria-sort="descending"]').count() == 1

    page.locator(".tiles .tile-text").first.hover()
    assert page.locator("#readout").is_visible() and "against" in page.locator("#readout").inner_text()
    chart = page.locator('svg[data-chart="val/kl"]')
    chart.scroll_into_view_if_needed()
    chart.hover()
    assert page.locator("#readout .key").all_inner_texts()[0].startswith(comparison.methods[0].name)
    page.close()
