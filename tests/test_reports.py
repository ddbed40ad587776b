"""The run page and the terminal panels: they show the content of the files and do not invent absent numbers."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from spo.pages.charts import MAX_POINTS, bin_edges, nice_ticks, thin, tick_text
from spo.pages.charts.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from spo.pages.panels import result_panel, start_panel
from spo.pages.run_page import render_report
from spo.wording import clean, duration, finite, number, shorten

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\x1b[31m\x00 \ud800 {{ 7 * 7 }}"
CONFIG = """\
method:
  loss: {_target_: spo.losses.SPOLoss}
alpha: {_target_: spo.schedules.Constant, value: 0.05}
beta: {_target_: spo.schedules.Constant, value: 0.02}
regularizer: {_target_: spo.regularizers.GlobalKL, weight: 0.02}
trainer: {max_steps: 60}
seed: 7
"""
METRICS = {
    "eval/win_rate": 0.7125,
    "eval/win_rate_ci_low": 0.65,
    "eval/win_rate_ci_high": 0.77,
    "eval/reward": 0.6,
    "eval/reference/reward": 0.4,
    "eval/reward/complete_plot": 0.55,
    "eval/reference/reward/complete_plot": 0.25,
    "eval/kl": 21.5,
    "eval/entropy": 0.9,
    "eval/reference/entropy": 1.4,
    "eval/distinct_2": 0.31,
    "eval/reference/distinct_2": 0.4,
    "eval/length": 61.4,
    "eval/reference/length": 65.3,
    "data/pairs_read": 2048,
    "data/pairs_used": 2011,
    "time/sft_seconds": 21.44,
    "time/train_tokens_per_second": 41233.7,
}


def history() -> list[dict[str, Any]]:
    generator, rows = random.Random(0), []
    for step in range(1, 61):
        rows.append(
            {
                "step": step,
                "train/loss": 2 / step + generator.gauss(0, 0.1),
                "train/rewards/chosen": step / 60,
                "train/rewards/rejected": -step / 30,
                "train/rewards/accuracies": 0.5 + step / 150,
                "train/kl": 0.4 * step,
                "train/grad_norm": generator.random(),
                "train/alpha": 0.05,
                "train/beta": 0.02,
                "train/regularizer/staleness": step % 8,
            }
        )
        if step % 20 == 0:
            rows.append({"step": step, "val/loss": 2.1 / step, "val/kl": 0.41 * step})
    return rows


def samples(count: int = 40) -> list[dict[str, Any]]:
    generator, rows = random.Random(1), []
    for index in range(count):
        policy, reference = generator.gauss(0.6, 0.2), generator.gauss(0.4, 0.2)
        rows.append(
            {
                "prompt_id": f"p{index}",
                "split": "test",
                "sample_index": 0,
                "prompt": f"Once {index}",
                "completion": f"policy text {index}",
                "tokens": [1] * (index + 3),
                "reward": policy,
                "logp_policy": -50.0 - index,
                "logp_reference": -60.0,
                "reference_completion": f"reference text {index}",
                "reference_reward": reference,
                "verdict": 1.0 if policy > reference else 0.0,
            }
        )
    return rows


def write_run(path: Path, **files: Any) -> Path:
    """Write a run directory; a file given as ``None`` is omitted, a string is written as it is."""
    everything: dict[str, Any] = {
        "config.yaml": CONFIG,
        "metrics.json": METRICS,
        "history.jsonl": history(),
        "samples.jsonl": samples(),
        "provenance.json": {"git_sha": "0123abc", "versions": {"torch": "2.x"}},
    }
    everything |= {name.replace("__", "."): value for name, value in files.items()}
    path.mkdir(parents=True, exist_ok=True)
    for name, value in everything.items():
        if value is None:
            continue
        if isinstance(value, list):
            value = "".join(json.dumps(row) + "\n" for row in value)
        elif not isinstance(value, str):
            value = json.dumps(value)
        (path / name).write_text(value, encoding="utf-8")
    return path


class Page(HTMLParser):
    """A parsed page: its elements, the text of each, and all visible text."""

    VOID = frozenset({"meta", "input", "link", "img", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, list[str]] = {}
        self.words: list[str] = []
        self.stack: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)
            self.data.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-1:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack:
            self.data[self.stack[-1]][-1] += data
        if not {"script", "style"} & set(self.stack):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def all_charts(self) -> list[dict[str, Any]]:
        (payload,) = re.findall(r'<script type="application/json" id="chart-data">(.*?)</script>', self.source, re.S)
        found: list[dict[str, Any]] = json.loads(payload)
        return found

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        return {chart["key"]: chart for chart in self.all_charts}


def report(path: Path, **files: Any) -> Page:
    return Page(render_report(write_run(path, **files)))


def test_run_page_shows_the_content_of_the_files(tmp_path: Path) -> None:
    page = report(tmp_path / "run-a")
    for words in (
        "SPO alpha 0.05 beta 0.02 seed 7",
        "0.713 95% interval 0.650 – 0.770",
        "the policy beats the reference",
        "reward 0.400 0.600 +0.200",
        "reward: complete plot 0.250 0.550 +0.300",
        "KL to the reference – 21.50 – nats per sequence",
        "entropy 1.400 0.900 -0.500 nats per token",
        "pairs used 2,011",
        "pairs read 2,048 pairs used 2,011",
        "sft 21.4 s",
        "tokens per second 41,234",
        "git_sha 0123abc",
        "max_steps: 60",
        "policy text 3",
        "reference text 3",
    ):
        assert words in page.text, words
    assert "Missing or omitted" not in page.text
    wins = sum(row["verdict"] == 1 for row in samples())
    assert f"{wins} wins, 0 ties, {40 - wins} losses" in page.text


def test_run_page_is_self_contained(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert not re.search(r"https?://|//cdn|@import|url\(", page.source)
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "foreignobject"}
        assert not {"src", "href", "srcset", "action", "data", "background", "xlink:href"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_run_page_escapes_hostile_text(tmp_path: Path) -> None:
    rows = samples(4)
    for key in ("prompt_id", "prompt", "completion", "reference_completion"):
        rows[0][key] = HOSTILE
    plain = report(tmp_path / "plain")
    page = report(
        tmp_path / "hostile",
        samples__jsonl=rows,
        metrics__json=METRICS | {"eval/" + HOSTILE: 1.0, "data/" + HOSTILE: 2, HOSTILE: 3},
        provenance__json={"command": HOSTILE, HOSTILE: [HOSTILE]},
        history__jsonl=[*history(), {"step": 61, "train/" + HOSTILE: 1.0}],
        config__yaml=CONFIG + "note: '</script><script>alert(1)</script>'\n",
    )
    kinds = [[tag for tag, _ in one.elements if tag in {"script", "img", "style"}] for one in (plain, page)]
    assert kinds[0] == kinds[1] == ["style", "script", "script"]
    assert (
        "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>␛[31m␀ ? {{ 7 * 7 }}" in page.text
    )
    assert any("</script>" in key for key in page.charts)


def test_tags_are_shown_because_they_tell_an_extrapolated_run(tmp_path: Path) -> None:
    page = report(tmp_path / "run", config__yaml=CONFIG + "tags: [extrapolated 0.5, 3]\n")
    assert "extrapolated 0.5 · regularizer GlobalKL" in page.text
    damaged = report(tmp_path / "damaged", config__yaml=CONFIG + "tags: extrapolated\n")
    assert "d · regularizer" not in damaged.text and "regularizer GlobalKL" in damaged.text


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+),([-\d.]+)", path)]


def test_interval_is_a_band_around_its_metric(tmp_path: Path) -> None:
    key = "val/samples/win_rate"
    rows = [
        {"step": step, key: value, f"{key}_ci_low": value - 0.1, f"{key}_ci_high": value + 0.1}
        for step, value in ((0, 0.5), (10, 0.6))
    ]
    run = write_run(tmp_path / "run", history__jsonl=rows)
    page = Page(render_report(run))
    [chart] = [chart for chart in page.all_charts if "win_rate" in chart["key"]]
    assert [one["name"] for one in chart["series"]] == ["val"] and chart["series"][0]["values"] == [0.5, 0.6]
    assert page.source.count('<polygon class="band hue-1"') == 1


def test_dash_and_not_color_tells_validation_from_training(tmp_path: Path) -> None:
    page = report(tmp_path / "run")
    train, val = page.charts["loss"]["series"]
    assert (train["hue"], train["dashed"]) == (1, False) and (val["hue"], val["dashed"]) == (1, True)
    chosen, rejected = page.charts["rewards/chosen-rewards/rejected"]["series"]
    assert (chosen["hue"], rejected["hue"]) == (1, 2) and chosen["dashed"] == rejected["dashed"]


def test_charts_contain_the_numbers_of_the_history(tmp_path: Path) -> None:
    page, rows = report(tmp_path), history()
    for key, names in {
        "loss": {"train": "train/loss", "val": "val/loss"},
        "kl": {"train": "train/kl", "val": "val/kl"},
        "rewards/chosen-rewards/rejected": {
            "chosen, train": "train/rewards/chosen",
            "rejected, train": "train/rewards/rejected",
        },
        "grad_norm": {"train": "train/grad_norm"},
        "regularizer/staleness": {"train": "train/regularizer/staleness"},
    }.items():
        drawn = {one["name"]: one for one in page.charts[key]["series"]}
        assert drawn.keys() == names.keys()
        for name, metric in names.items():
            expected = {row["step"]: row[metric] for row in rows if metric in row}
            assert drawn[name]["steps"] == list(expected)
            assert drawn[name]["values"] == pytest.approx(list(expected.values()), rel=1e-6)
    assert "alpha" not in page.charts and "beta" not in page.charts  # constant: in the title, no curve

    # Pixels are an affine map of steps and values, which is the same for both lines.
    (svg,) = re.findall(r'<svg class="chart" data-chart="kl".*?</svg>', page.source)
    lines = [points(path) for path in re.findall(r'<path class="curve[^"]*" d="([^"]*)"', svg)]
    values = [[row[key] for row in rows if key in row] for key in ("train/kl", "val/kl")]
    steps = [[row["step"] for row in rows if key in row] for key in ("train/kl", "val/kl")]
    slope = (lines[0][-1][1] - lines[0][0][1]) / (values[0][-1] - values[0][0])
    assert slope < 0
    for line, at, series in zip(lines, steps, values, strict=True):
        for (x, y), step, value in zip(line, at, series, strict=True):
            assert x == pytest.approx(LEFT + (step - 1) / 59 * (WIDTH - LEFT - RIGHT), abs=0.06)
            assert y == pytest.approx(lines[0][0][1] + slope * (value - values[0][0]), abs=0.2)
            assert TOP <= y <= HEIGHT - BOTTOM


def test_schedules_are_drawn_if_they_vary_and_the_method_uses_them(tmp_path: Path) -> None:
    rows = [{"step": s, "train/loss": 1.0, "train/alpha": 0.1 / s} for s in range(1, 5)]
    config = CONFIG.replace("Constant, value: 0.05", "Cosine, start: 0.1, end: 0.025")
    page = report(tmp_path, history__jsonl=rows, config__yaml=config)
    assert page.charts["alpha"]["series"][0]["values"] == pytest.approx([0.1, 0.05, 0.1 / 3, 0.025])
    assert "SPO alpha 0.1 → 0.025 (cosine) seed 7" in page.text


def test_title_of_an_untrained_run_omits_what_its_method_does_not_read(tmp_path: Path) -> None:
    rows = [{"step": 0, "val/loss": 1.0}]  # An extrapolated run takes no training step.
    config = f"model: {{path: /x/sft/{'0f' * 16}}}\ntags: [extrapolated 0.5]\n{CONFIG}"
    identity = {"config": {"beta.value": 0.02, "seed": 7}}
    page = report(tmp_path / "run", history__jsonl=rows, config__yaml=config, identity__json=identity)
    assert "SPO beta 0.02 seed 7" in page.text and "alpha 0.05" not in page.text
    assert "extrapolated 0.5" in page.text and "model 0f" not in page.text
    config = config.replace(f"/x/sft/{'0f' * 16}", "/x/round-2/policy")
    page = report(tmp_path / "older", history__jsonl=rows, config__yaml=config)
    assert "SPO alpha 0.05 beta 0.02 seed 7" in page.text and "model round-2" in page.text


def test_run_page_omits_reward_and_win_rate_without_a_reward(tmp_path: Path) -> None:
    hidden = ("reward", "reference_reward", "verdict")
    page = report(
        tmp_path,
        samples__jsonl=[{k: v for k, v in row.items() if k not in hidden} for row in samples()],
        metrics__json={k: v for k, v in METRICS.items() if "reward" not in k and "win_rate" not in k},
    )
    assert "No win rate: this run was evaluated without a reward or a judge." in page.text
    assert "interval-bar" not in [a.get("class") for _, a in page.elements]
    assert "histogram" not in [a.get("class") for _, a in page.elements]
    assert not any("data-verdict" in a or "data-delta" in a for _, a in page.elements)
    assert "reward" not in page.data["dt"] and "wins" not in page.text
    assert "policy text 3" in page.text and "entropy 1.400 0.900" in page.text


def test_run_page_states_that_a_run_is_unfinished(tmp_path: Path) -> None:
    page = report(tmp_path, metrics__json=None, samples__jsonl=None, provenance__json=None)
    assert "This run has not finished: it was logged up to step 60 of 60." in page.text
    assert "metrics.json is missing" in page.text and "No samples were recorded." in page.text
    assert "Nothing was evaluated yet." in page.text and "loss" in page.charts


@pytest.mark.parametrize("text", [None, "", "\n\n"])
def test_run_page_states_that_the_history_is_empty(tmp_path: Path, text: str | None) -> None:
    page = report(tmp_path, history__jsonl=text, metrics__json=None)
    assert "no step has been logged yet" in page.text
    assert "there are no curves" in page.text and page.charts == {}


def test_damaged_lines_are_skipped_and_reported(tmp_path: Path) -> None:
    whole = "".join(json.dumps(row) + "\n" for row in history())
    page = report(tmp_path, history__jsonl=whole + '{"step": 61, "train/loss": 0.')
    assert "The last line of history.jsonl (line 64) is cut off" in page.text
    assert page.charts["loss"]["series"][0]["steps"] == list(range(1, 61))
    middle = report(tmp_path, history__jsonl="garbage\n" + whole)
    assert "Damaged lines of history.jsonl were skipped: 1 (line 1)." in middle.text


def test_run_page_is_written_despite_damaged_files(tmp_path: Path) -> None:
    write_run(tmp_path, metrics__json='{"eval/win_rate": 0.', config__yaml="a: [1\n", provenance__json="[1]")
    (tmp_path / "samples.jsonl").write_bytes('{"prompt": "é"}\n{"prompt": "é'.encode()[:-1])
    page = Page(render_report(tmp_path))
    assert "metrics.json is damaged" in page.text and "config.yaml is not valid YAML" in page.text
    assert "provenance.json is not a JSON object" in page.text and "last line of samples.jsonl" in page.text
    assert "not recorded" in page.text


def test_non_finite_values_become_gaps_and_words(tmp_path: Path) -> None:
    rows = [{"step": s, "train/loss": math.nan if s in (3, 4) else float(s)} for s in range(1, 8)]
    rows[6]["train/loss"] = math.inf
    page = report(
        tmp_path,
        history__jsonl=rows,
        metrics__json={"eval/win_rate": math.nan, "eval/kl": math.inf, "eval/length": 10**400},
    )
    assert page.charts["loss"]["series"][0]["values"] == [1, 2, None, None, 5, 6, None]
    (svg,) = re.findall(r'<svg class="chart" data-chart="loss".*?</svg>', page.source)
    (path,) = re.findall(r'<path class="curve[^"]*" d="([^"]*)"', svg)
    assert path.count("M") == 2 and len(points(path)) == 4
    assert "3 values that are not finite, drawn as gaps" in page.text
    assert "The win rate that was recorded is not finite." in page.text
    assert "KL to the reference – not finite" in page.text
    assert not re.search(r"\bnan\b|\binf\b", page.text + svg, re.I)


def test_step_logged_twice_keeps_its_last_value(tmp_path: Path) -> None:
    rows = [{"step": 1, "train/loss": 5.0}, {"step": 2, "train/loss": 4.0}, {"step": 2, "train/loss": 3.0}]
    page = report(tmp_path, history__jsonl=[*rows, {"train/loss": 9.0}])
    assert page.charts["loss"]["series"][0]["values"] == [5.0, 3.0]
    assert "1 rows of history.jsonl do not have a step" in page.text


def test_rendering_again_gives_the_same_bytes_and_no_other_file(tmp_path: Path) -> None:
    write_run(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    first = render_report(tmp_path).read_bytes()
    assert render_report(tmp_path).read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == before | {"report.html"}


def test_run_page_of_a_large_run_stays_below_a_megabyte(tmp_path: Path) -> None:
    rows = samples(600)
    for row in rows:
        row["completion"] = row["reference_completion"] = "<&é" * 3000
    keys = [f"train/{name}" for name in ("loss", "kl", "entropy", "grad_norm", *map(str, range(40)))]
    long = [{"step": s, **{key: math.sin(s * (i + 1)) for i, key in enumerate(keys)}} for s in range(1, 2001)]
    page = report(tmp_path, samples__jsonl=rows, history__jsonl=long, config__yaml=CONFIG + "x: " + "y" * 300_000)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert "of 600 evaluated completions (test split): the first of the file and the largest reward" in page.text
    assert "further curves of history.jsonl are not drawn" in page.text
    assert "characters more)" in page.text


def test_samples_on_the_page_include_the_extremes(tmp_path: Path) -> None:
    rows = samples(300)
    page = report(tmp_path, samples__jsonl=rows)
    deltas = [row["reward"] - row["reference_reward"] for row in rows]
    shown = {int(a["data-place"] or -1): float(a["data-delta"] or 0) for t, a in page.elements if "data-place" in a}
    assert {deltas.index(max(deltas)), deltas.index(min(deltas)), 0, 1, 2} <= shown.keys()
    assert all(shown[place] == deltas[place] for place in shown) and list(shown) == sorted(shown)


def test_directory_without_a_run_gives_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run directory"):
        render_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        render_report(tmp_path / "absent")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (1e-7, 3e-7), (1234.5, 1236.0), (0, 5e6), (-1e-3, 0)])
def test_ticks_are_round_in_range_and_evenly_spaced(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 8 and low <= ticks[0] + 1e-12 and ticks[-1] <= high + 1e-12
    step = ticks[1] - ticks[0]
    assert [b - a for a, b in itertools.pairwise(ticks)] == pytest.approx([step] * (len(ticks) - 1))
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6
    texts = [tick_text(tick, step) for tick in ticks]
    assert len(set(texts)) == len(texts) and max(map(len, texts)) <= 7


def test_thinning_keeps_ends_and_spikes_and_adds_no_point() -> None:
    values = [math.sin(i / 500) for i in range(20_000)]
    values[12_345], values[777] = 50.0, -50.0
    steps, kept = thin(range(20_000), values)
    assert len(steps) <= MAX_POINTS and steps[0] == 0 and steps[-1] == 19_999
    assert max(kept) == 50.0 and min(kept) == -50.0 and steps == sorted(set(steps))
    assert all(values[int(step)] == value for step, value in zip(steps, kept, strict=True))
    holes, gaps = thin(range(5000), [math.nan] * 5000)
    assert len(holes) <= MAX_POINTS and all(math.isnan(gap) for gap in gaps)


@pytest.mark.parametrize("values", [[0.5], [2.0] * 9, [0.0, 1.0], [random.Random(3).gauss(0, 1) for _ in range(500)]])
def test_histogram_bins_cover_the_values(values: list[float]) -> None:
    edges = bin_edges(values)
    assert edges[0] <= min(values) and edges[-1] >= max(values) and 6 <= len(edges) - 1 <= 32
    assert all(a < b for a, b in itertools.pairwise(edges))


def test_histogram_shares_add_up(tmp_path: Path) -> None:
    page = report(tmp_path)
    titles = [text for text in page.data["title"] if "policy" in text]
    shares = {
        who: [float(v) for t in titles for v in re.findall(who + r" ([\d.]+)%", t)] for who in ("policy", "reference")
    }
    for one in shares.values():
        assert sum(one) == pytest.approx(100, abs=0.05 * len(titles))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "not finite"),
        (0, "0"),
        (0.0, "0"),
        (0.71254, "0.713"),
        (0.05, "0.0500"),
        (21.456, "21.46"),
        (-3.9, "-3.900"),
        (2048, "2,048"),
        (12345.6, "12,346"),
        (1.5e-7, "1.500e-07"),
        ("warm", "warm"),
        (True, "True"),
    ],
)
def test_number_writes_each_kind_of_value(value: Any, text: str) -> None:
    assert number(value) == text


def test_wording_helpers() -> None:
    assert number(0.25, signed=True) == "+0.250" and number(-0.25, signed=True) == "-0.250"
    assert duration("sft_seconds", 3.21) == ("sft", "3.2 s")
    assert duration("tokens_per_second", 900.0) == ("tokens_per_second", "900.0")
    assert duration("total", 3.0) == ("total", "3.000") and duration("sft_seconds", None) == ("sft_seconds", "–")
    assert finite(True) is None and finite("1") is None and finite(2) == 2.0
    assert clean("a\r\nb\tc\x9b\x7f") == "a\nb\tc\ufffd␡"
    assert shorten("abcdef", 3) == "abc … (3 characters more)" and shorten("abc", 3) == "abc"


@pytest.mark.parametrize("columns", [30, 80, 160])
def test_panels_fit_any_terminal_width(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    (tmp_path / "report.html").write_text("")
    rows = samples(9)
    rows[0]["completion"] = "[bold]markup[/bold] \x1b[31m " + "long" * 40
    rows[0]["reward"] = 9.0
    start_panel("spo train", {"policy": "tiny, " + "x" * 200, "pairs": "[red]2,011"}, ["alpha is far [off]"])
    result_panel(METRICS, rows, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    out = " ".join(re.sub("[│╭╮╰╯─]", " ", line).strip() for line in lines)
    assert all(len(line) <= columns for line in lines if str(tmp_path) not in line)
    assert f"report   {tmp_path / 'report.html'}" in lines  # in one line, to be copied
    assert "\x1b" not in out
    squeezed = re.sub(r"\s+", "", out)
    for words in ("[red]2,011", "alphaisfar[off]", "0.713", "[0.650,0.770]", "largestgain(win)", "largestdrop(loss)"):
        assert words in squeezed, words
    if columns == 30:  # stacked, so that a text is not interleaved with its neighbor
        assert "[bold]markup[/bold]␛[31m" + "long" * 40 in squeezed
    else:
        assert "reward 0.400 0.600" in re.sub(r" +", " ", out)


def test_panels_work_without_a_reward_or_any_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result_panel({}, [{"prompt": "p"}], tmp_path)
    out = capsys.readouterr().out
    assert "No win rate" in out and "no final evaluation was recorded" in out and "(not recorded)" in out
    assert "nan" not in out.lower() and "report" not in out
    result_panel({"eval/win_rate": 0.5, "eval/win_rate_ci_low": 0.4, "eval/win_rate_ci_high": 0.6}, [], tmp_path)
    assert "no difference to the reference is shown" in capsys.readouterr().out


def test_panels_work_on_an_ascii_terminal(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom spo.pages.panels import result_panel, start_panel\n"
        "start_panel('a \\u00b7 b', {'\\u03b1': '\\u2192'}, ['\\u4e00'])\n"
        "result_panel({'eval/win_rate': 0.7, 'eval/kl': 3.0}, [{'completion': '\\ud800\\u00e9'}], Path('.'))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[1], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.isascii() and b"win rate" in done.stdout


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """Load a page in a headless browser; return the document after its scripts ran, and the console."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no browser")
    options = ["--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    options += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [found[0], *options, f"--user-data-dir={profile}", "--window-size=1280,900", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode(), done.stderr.decode(errors="replace")


@pytest.mark.browser
def test_browser_shows_the_run_page_and_its_controls_work(tmp_path: Path) -> None:
    rows = samples(30)
    rows[0]["completion"] = HOSTILE
    path = render_report(write_run(tmp_path / "run", samples__jsonl=rows))
    dom, console = browse(path, tmp_path / "profile")
    assert "CONSOLE" not in console, console
    assert dom.count('<svg class="chart"') == len(Page(path).charts) and '<svg class="histogram"' in dom
    assert "owned" not in re.findall("<title>(.*?)</title>", dom)[0]
    assert "6 of 30 shown" in dom

    # A copy of the page acts as a person would: it hovers over a chart, sorts and filters, and records what it sees.
    act = """
      const svg = document.querySelector('svg[data-chart="kl"]'), box = svg.getBoundingClientRect();
      const clientX = box.left + box.width * 0.967, clientY = box.top + 9;
      svg.dispatchEvent(new PointerEvent("pointermove", {clientX, clientY, bubbles: true}));
      const change = (id, value) => { const one = document.getElementById(id); one.value = value;
        one.dispatchEvent(new Event("change", {bubbles: true})); };
      const seen = () => [...document.querySelectorAll(".sample:not([hidden])")].map((one) => one.dataset.place);
      const said = {readout: document.getElementById("readout").innerText};
      change("order", "win"); said.win = seen();
      change("order", "loss"); said.loss = seen();
      change("order", "far"); said.far = seen();
      change("order", "place"); change("verdict", "loss"); said.losses = seen();
      change("verdict", ""); document.getElementById("more").click(); said.more = seen().length;
      const find = document.getElementById("find"); find.value = "text 17";
      find.dispatchEvent(new Event("input")); said.find = seen();
      const out = document.createElement("pre"); out.id = "said"; out.textContent = JSON.stringify(said);
      document.body.append(out);
    """
    source = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text(encoding="utf-8"))
    acted = tmp_path / "acted.html"
    acted.write_text(source.replace("</body>", f"<script>{{{act}}}</script></body>"), encoding="utf-8")
    dom, console = browse(acted, tmp_path / "profile")
    assert "Uncaught" not in console, console
    readings = json.loads(re.findall(r'<pre id="said">(.*?)</pre>', dom, re.S)[0])
    deltas = [row["reward"] - row["reference_reward"] for row in rows]
    order = sorted(range(30), key=lambda i: -deltas[i])
    assert readings["readout"].split("\n") == ["step 60", "train 24", "val 24.6"]
    assert [int(place) for place in readings["win"]] == order[:6]
    assert [int(place) for place in readings["loss"]] == order[::-1][:6]
    distance = [abs(row["logp_policy"] - row["logp_reference"]) for row in rows]
    assert [distance[int(place)] for place in readings["far"]] == sorted(distance, reverse=True)[:6]
    losing = [str(i) for i in range(30) if rows[i]["verdict"] == 0]
    assert readings["losses"] == losing[:6]
    assert readings["more"] == 18 and readings["find"] == ["17"]
