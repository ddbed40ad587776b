"""The dashboard's file: what it may hold, and that it is what pages draw."""

from __future__ import annotations

from pathlib import Path

import pytest

from spo.errors import UserError
from spo.reports.dashboard import Bars, Curves, Dashboard, Scatter, Section, load_spec, unit
from spo.reports.html import render_report
from tests.test_reports import Page, history, write_run

OWN = """\
title: Mine
sections:
  - title: Divergence
    panels:
      - {title: Loss of validation, metrics: [loss], splits: [val], bounds: [0, 1.5], baseline: 0.7}
      - {title: Win rate over KL, x: eval/kl, y: eval/win_rate}
      - {title: Win rate, final: [eval/win_rate]}
  - {title: Nothing of this run, panels: [{title: Absent, metrics: [absent]}]}
"""
BROKEN = """\
title: 3
colour: red
sections:
  - title: A
    panels:
      - {title: a, metrics: [], zap: 1}
      - {title: b, metrics: [loss], bounds: [1, 0], baseline: .nan}
      - {title: c, metrics: [loss], x: eval/kl, y: eval/kl}
      - {x: eval/kl}
      - 3
  - {title: B, panels: []}
"""


def test_a_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OWN)
    loss = Curves("Loss of validation", ("loss",), ("val",), (0, 1.5), 0.7)
    first = Section(
        "Divergence",
        (loss, Scatter("Win rate over KL", "eval/kl", "eval/win_rate"), Bars("Win rate", ("eval/win_rate",))),
    )
    dashboard = load_spec(tmp_path / "mine.yaml")
    assert dashboard == Dashboard("Mine", (first, Section("Nothing of this run", (Curves("Absent", ("absent",)),))))
    assert first.curves == (loss,)
    assert dashboard.keys == {"val/loss", "eval/kl", "eval/win_rate", "train/absent", "val/absent"}


def test_every_mistake_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(BROKEN)
    with pytest.raises(UserError) as caught:
        load_spec(str(tmp_path / "mine.yaml"))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("mine.yaml is no dashboard:")
    places = [line.removeprefix("  - ").partition(":")[0] for line in lines[1:]]
    panels = [f"sections[0].panels[{place}]" for place in ("0].metrics", "0].zap", "1].bounds", "1].baseline")]
    assert {place.rstrip("]") for place in places} == {
        *("title", "colour", "sections[1].panels", "sections[0].panels[2", "sections[0].panels[4"),
        *("sections[0].panels[3].title", "sections[0].panels[3].y"),
        *(panel.rstrip("]") for panel in panels),
    }


@pytest.mark.parametrize(
    ("text", "words"), [("a: [1", "is no yaml"), ("", "is no dashboard"), ("- 1", "is no dashboard")]
)
def test_a_file_that_is_no_dashboard(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        load_spec(tmp_path / "mine.yaml")


def test_a_name_that_is_not_shipped_is_answered_with_those_that_are() -> None:
    with pytest.raises(UserError, match="no dashboard nothing: give a yaml file, or one of alignment"):
        load_spec("nothing")


def test_units_are_those_of_the_split_where_it_has_its_own() -> None:
    units = [unit(key) for key in ("eval/kl", "train/entropy", "exact/entropy", "exact/tv")]
    assert units == ["nats per sequence", "nats per token", "nats per response", ""]


def test_the_report_draws_the_dashboard_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OWN)
    page = Page(render_report(write_run(tmp_path / "run"), load_spec(tmp_path / "mine.yaml")))
    first, *further = page.charts.values()
    assert first["key"] == "loss" and [one["name"] for one in first["series"]] == ["val"]
    assert first["series"][0]["values"] == pytest.approx([r["val/loss"] for r in history() if "val/loss" in r])
    assert "Divergence Loss of validation" in page.text and "Nothing of this run" not in page.text
    assert {"kl", "grad_norm", "rewards/chosen"} <= {chart["key"] for chart in further}  # each has a panel of its own
    assert "Further curves" in page.text


def test_one_panel_may_show_the_metrics_of_another(tmp_path: Path) -> None:
    """The read-out under the pointer finds a chart by its place on the page, as its key may come twice."""
    panels = (Curves("Training", ("loss",), ("train",)), Curves("Validation", ("loss",), ("val",)))
    page = Page(render_report(write_run(tmp_path), Dashboard("Twice", (Section("Loss", panels),))))
    keys = [attributes["data-chart"] for tag, attributes in page.elements if "data-chart" in attributes]
    assert keys[:2] == ["loss", "loss"]
