"""The page and the table of an iteration, and its alarms."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spo import cli
from spo.metrics.catalogue import label, unit
from spo.metrics.rounds import Measured
from spo.pages.charts import RoundSeries, rounds_chart
from spo.pages.iteration_page import FIRST_KL, render_iteration, time_text
from spo.pages.iteration_table import print_iteration
from spo.records.iteration import Iteration, write_iteration
from spo.rounds.alarms import alarms_of_run, round_alarms
from tests.iterations import make_iteration

LIMITS: dict[str, Any] = {"max_length_ratio": 1.5, "min_length_ratio": 0.67, "min_diversity_ratio": 0.7}


class Page(HTMLParser):
    """Texts, links and the depth of open tags of a page."""

    VOID = ("meta", "link", "br", "input")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name == "href" and value is not None]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts).replace("\u2011", "-")).strip()


def test_page_shows_each_round_with_intervals_and_links_its_report(tmp_path: Path) -> None:
    make_iteration(tmp_path / "mine")
    page = Page(file := render_iteration(tmp_path / "mine"))
    assert file == tmp_path / "mine" / "report.html" and page.open == []
    assert page.links == [f"round-{number}/report.html" for number in range(4)]
    assert all((file.parent / link).is_file() for link in page.links)
    assert (
        "beats the first model (win rate 0.780, 95% interval 0.740 to 0.820), at a KL of 8.600 nats per sequence"
        in page.text
    )
    assert "it beats the previous round (win rate 0.560, 95% interval 0.520 to 0.600)" in page.text
    for key in ("kl", FIRST_KL, "reward", "entropy", "length", "distinct_2", "self_bleu"):
        assert label(key) in page.text and unit(key) in page.text
    for words in (
        "3 of 3 rounds finished",
        "RejectionSampling",
        "pairing · beta",
        "pairs.jsonl",
        "the reference is the previous round",
        "0.458 – 0.558",
    ):
        assert words in page.text
    assert (
        not any(words in page.text for words in ("policies", "StorySource", "somewhere", "num prompts"))
        and "Alarms" not in page.text
    )
    first = file.read_bytes()
    assert render_iteration(tmp_path / "mine").read_bytes() == first
    assert len(first) < 200_000 and b"http" not in re.sub(rb"http-equiv", b"", first)


def test_reference_that_stays_leaves_one_kl(tmp_path: Path) -> None:
    make_iteration(tmp_path, reference="first", extrapolated=True)
    page = Page(render_iteration(tmp_path))
    assert label(FIRST_KL) in page.text and label("kl") not in page.text
    assert page.links == ["round-0/report.html", *(f"round-{n}/extrapolated/report.html" for n in (1, 2, 3))]


def test_unfinished_iteration_has_a_page(tmp_path: Path) -> None:
    make_iteration(tmp_path / "running", 1, last="running")
    running = Page(render_iteration(tmp_path / "running")).text
    assert "This iteration has not finished: round 1 is running." in running and "0 of 3 rounds" in running
    assert "beats" not in running
    make_iteration(tmp_path / "failed", 2, last="failed")
    failed = Page(render_iteration(tmp_path / "failed")).text
    assert "Round 2 has failed." in failed and "After one round, the policy beats the first model" in failed
    write_iteration(tmp_path / "empty", Iteration("dpo", "previous", 2))
    assert "No round has been evaluated yet." in Page(render_iteration(tmp_path / "empty")).text


def test_difference_that_is_not_shown_is_said_so(tmp_path: Path) -> None:
    make_iteration(tmp_path, 1)
    file = tmp_path / "round-1" / "metrics.json"
    metrics = json.loads(file.read_text())
    for low, high, words in ((0.45, 0.6, "is not shown to differ from"), (0.3, 0.45, "loses to")):
        file.write_text(json.dumps(metrics | {"eval/win_rate_ci_low": low, "eval/win_rate_ci_high": high}))
        assert f"the policy {words} the first model" in Page(render_iteration(tmp_path)).text


def test_texts_are_escaped_and_alarms_are_on_top(tmp_path: Path) -> None:
    iteration = make_iteration(tmp_path)
    iteration.name = "<b>dpo</b>"
    iteration.rounds[2].alarms = ["length: <i>long</i>"]
    write_iteration(tmp_path, iteration)
    page = Page(render_iteration(tmp_path))
    assert "<b>dpo</b>" in page.text and "length: <i>long</i>" in page.text and "b" not in page.open
    assert page.text.index("length: <i>") < page.text.index("After 3 rounds")


def test_damaged_configuration_leaves_its_settings_out(tmp_path: Path) -> None:
    make_iteration(tmp_path, 2)
    for number, text in enumerate(("a: [", ""), 1):
        (tmp_path / f"round-{number}" / "config.yaml").write_text(text)
    page = Page(render_iteration(tmp_path)).text
    assert "RejectionSampling" in page and "Training of each round" not in page


def test_coefficient_that_the_method_does_not_read_is_left_out(tmp_path: Path) -> None:
    make_iteration(tmp_path, 1)
    assert "beta" in Page(render_iteration(tmp_path)).texts
    identity = tmp_path / "round-1" / "identity.json"
    for key, is_shown in (("beta.value", True), ("alpha.value", False)):
        identity.write_text(json.dumps({"config": {key: 0.1}}))
        assert ("beta" in Page(render_iteration(tmp_path)).texts) is is_shown


def test_command_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_iteration(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "mine"]) == 0
    assert capsys.readouterr().out.strip() == "mine/report.html"
    assert cli.main(["report", "mine", "--spec", "alignment"]) == 1
    assert "fixed figures; leave it out" in capsys.readouterr().err
    (tmp_path / "mine" / "iterate.json").write_text("[]")
    assert cli.main(["report", "mine"]) == 1
    assert "iterate.json is damaged" in capsys.readouterr().err


def test_chart_has_a_gap_where_a_round_is_missing() -> None:
    values = {0: Measured(1.0), 1: Measured(2.0, 1.5, 2.5), 3: Measured(4.0)}
    drawn = str(rounds_chart("Length", [RoundSeries("length", 4, values)], 4, baseline=1.0))
    (path,) = re.findall(r'class="curve hue-4" d="([^"]+)"', drawn)
    assert re.sub(r"[\d.,]", "", path) == "MLM"
    assert drawn.count('class="whisker') == 1 and drawn.count("<title>") == 3 and 'class="baseline"' in drawn
    assert "round 1\nlength 2.000\n95% interval 1.500 to 2.500" in drawn


def test_table_has_a_row_for_each_round(tmp_path: Path) -> None:
    iteration = make_iteration(tmp_path, last="failed")
    iteration.rounds[2].alarms = ["length: long"]
    write_iteration(tmp_path, iteration)
    out = io.StringIO()
    print_iteration(tmp_path, Console(file=out, width=80))
    text = out.getvalue()
    assert "0.660" in text and "0.62–0.70" in text and "length: long" in text
    assert "2 of 3 rounds finished" in text and "and chosen responses" in text
    assert re.findall(r"^(\d)( failed)? ", text, re.MULTILINE)[:4] == [
        ("0", ""),
        ("1", ""),
        ("2", ""),
        ("3", " failed"),
    ]
    assert max(map(len, text.splitlines()[2:12])) <= 80


@pytest.mark.parametrize(("width", "left_out"), [(60, 2), (70, 1), (80, 0), (100, 0), (120, 0)])
def test_a_narrow_terminal_has_fewer_quantities_and_whole_words(width: int, left_out: int, tmp_path: Path) -> None:
    make_iteration(tmp_path)
    out = io.StringIO()
    print_iteration(tmp_path, Console(file=out, width=width))
    text = out.getvalue()
    head, words, first = text.splitlines()[2:5]
    assert words.split() == [
        *["round", "previous", "first", "data", "first", "entropy", "length", "2"][: 8 - left_out],
        "time",
    ]
    assert head.split()[:5] == ["against", "against", "against", "KL", "to"] and first.startswith("0 ")
    assert max(map(len, text.splitlines()[2:12])) <= width and "…" not in text
    assert ("on the page: length, distinct-2\n" in text) == (left_out == 2)


def test_time_is_in_minutes_where_it_is_long() -> None:
    assert [time_text(seconds) for seconds in (0, 119.4, 120, 5400)] == ["0 s", "119 s", "2.0 min", "90.0 min"]


# --- alarms --------------------------------------------------------------------------------------------------------


def changed(folder: Path, number: int, **values: float) -> None:
    """Set metrics of a round."""
    file = folder / f"round-{number}" / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {f"eval/{key}": one for key, one in values.items()}))


def test_alarms_state_what_ran_away_from_the_first_model(tmp_path: Path) -> None:
    iteration = make_iteration(tmp_path)
    changed(tmp_path, 0, length=40.0, distinct_2=0.5, self_bleu=0.2)

    def found(**values: float) -> list[str]:
        changed(tmp_path, 2, **({"length": 40.0, "distinct_2": 0.5, "self_bleu": 0.2} | values))
        return round_alarms(tmp_path, iteration, 2, **LIMITS)

    assert found() == found(length=60.0) == found(length=0.67 * 40) == found(distinct_2=0.35) == []
    assert found(self_bleu=0.43) == []  # 1 - 0.43 is 0.7125 times 1 - 0.2
    assert found(length=61.0) == [
        "length: completions of round 2 have 61.00 tokens on average, 1.52 times the 40.00 of the first model; the "
        "limit is 1.5"
    ]
    assert "0.50 times" in found(length=20.0)[0] and "limit is 0.67" in found(length=20.0)[0]
    (words,) = found(distinct_2=0.3)
    assert words.startswith("diversity: distinct-2 of round 2 is 0.300, 0.60 times the 0.500 of the first model")
    (words,) = found(self_bleu=0.6)
    assert words == (
        "diversity: 1 - self-BLEU of round 2 is 0.400, 0.50 times the 0.800 of the first model; the limit is 0.7"
    )
    assert len(found(length=400.0, distinct_2=0.0, self_bleu=1.0)) == 3


def test_alarms_of_a_run_take_the_limits_of_its_iteration(tmp_path: Path) -> None:
    iteration = make_iteration(tmp_path / "mine", extrapolated=True)
    assert alarms_of_run(tmp_path / "mine" / "round-3" / "extrapolated") == round_alarms(
        tmp_path / "mine", iteration, 3, **LIMITS
    )
    assert alarms_of_run(tmp_path / "mine" / "round-3") == alarms_of_run(tmp_path / "alone") == []
    assert len(alarms_of_run(tmp_path / "mine" / "round-3" / "extrapolated")) == 1
    iteration.settings = {}
    write_iteration(tmp_path / "mine", iteration)
    assert alarms_of_run(tmp_path / "mine" / "round-3" / "extrapolated") == []


def test_no_alarm_without_limits_or_numbers(tmp_path: Path) -> None:
    iteration = make_iteration(tmp_path, last="running")
    changed(tmp_path, 2, length=1000.0, distinct_2=0.0)
    assert round_alarms(tmp_path, iteration, 2, **dict.fromkeys(LIMITS)) == []
    assert round_alarms(tmp_path, iteration, 0, **LIMITS) == round_alarms(tmp_path, iteration, 3, **LIMITS) == []
    changed(tmp_path, 0, length=0.0, distinct_2=0.0, self_bleu=1.0)
    assert round_alarms(tmp_path, iteration, 2, **LIMITS) == []
