"""Dashboard files: their format, and the pages and workspaces that are drawn from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from spo import cli
from spo.errors import UserError
from spo.metrics.catalogue import comparable
from spo.pages.dashboard import (
    Bars,
    Coordinates,
    Curves,
    Dashboard,
    KeyImportance,
    RunTable,
    Scatter,
    Section,
    is_comparable,
    load_spec,
    unit_of,
)
from spo.pages.run_page import render_report
from spo.records.run import read_run
from spo.tracking.login import has_api_key
from spo.tracking.workspace import left_out, report, workspace
from tests.commands import TINY, job, numbers, rows, shared_cache
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
color: red
sections:
  - title: A
    panels:
      - {title: a, metrics: [], zap: 1}
      - {title: b, metrics: [loss], bounds: [1, 0], baseline: .nan}
      - {title: c, metrics: [loss], x: eval/kl, y: eval/kl}
      - {x: eval/kl}
      - 3
      - {title: d, parallel: [alpha.value], metric: val/win_rate, logarithmic: [beta.value]}
      - {runs: some}
      - {importance: "", title: e}
  - {title: B, panels: []}
"""


def test_dashboard_file_is_read(tmp_path: Path) -> None:
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


def test_every_error_is_reported_with_its_position(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(BROKEN)
    with pytest.raises(UserError) as caught:
        load_spec(str(tmp_path / "mine.yaml"))
    lines = str(caught.value).splitlines()
    assert "sections[0].panels[5]: logarithmic: beta.value is not one of the keys in parallel" in str(caught.value)
    assert lines[0].endswith("mine.yaml is not a dashboard:")
    places = [line.removeprefix("  - ").partition(":")[0] for line in lines[1:]]
    panels = [f"sections[0].panels[{place}]" for place in ("0].metrics", "0].zap", "1].bounds", "1].baseline")]
    assert {place.rstrip("]") for place in places} == {
        *("title", "color", "sections[1].panels", "sections[0].panels[2", "sections[0].panels[4"),
        *("sections[0].panels[3].title", "sections[0].panels[3].y", "sections[0].panels[5"),
        *(f"sections[0].panels[{place}" for place in ("6].runs", "7].importance", "7].title")),
        *(panel.rstrip("]") for panel in panels),
    }


@pytest.mark.parametrize(
    ("text", "words"), [("a: [1", "is not valid YAML"), ("", "is not a dashboard"), ("- 1", "is not a dashboard")]
)
def test_file_that_is_not_a_dashboard_is_rejected(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        load_spec(tmp_path / "mine.yaml")


def test_unknown_name_lists_the_shipped_dashboards() -> None:
    with pytest.raises(UserError, match="no dashboard nothing: give a yaml file, or one of alignment"):
        load_spec("nothing")


def test_units_of_exact_metrics_differ_from_other_splits() -> None:
    units = [unit_of(key) for key in ("eval/kl", "train/entropy", "exact/entropy", "exact/tv")]
    assert units == ["nats per sequence", "nats per token", "nats per response", ""]


def test_run_page_draws_the_given_dashboard(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OWN)
    page = Page(render_report(write_run(tmp_path / "run"), load_spec(tmp_path / "mine.yaml")))
    first, *further = page.charts.values()
    assert first["key"] == "loss" and [one["name"] for one in first["series"]] == ["val"]
    assert first["series"][0]["values"] == pytest.approx([r["val/loss"] for r in history() if "val/loss" in r])
    assert "Divergence Loss of validation" in page.text and "Nothing of this run" not in page.text
    assert {"kl", "grad_norm", "rewards/chosen"} <= {chart["key"] for chart in further}  # each has a panel of its own
    assert "Further curves" in page.text


def test_two_panels_may_show_the_same_metric(tmp_path: Path) -> None:
    """Check that charts are found by position on the page: their keys may occur twice."""
    panels = (Curves("Training", ("loss",), ("train",)), Curves("Validation", ("loss",), ("val",)))
    page = Page(render_report(write_run(tmp_path), Dashboard("Twice", (Section("Loss", panels),))))
    keys = [attributes["data-chart"] for tag, attributes in page.elements if "data-chart" in attributes]
    assert keys[:2] == ["loss", "loss"]


def test_metrics_beyond_the_dashboard_get_panels_of_their_own(tmp_path: Path) -> None:
    logged = [
        {"step": 1, "train/loss": 1.0, "train/method/gap": 2.0},
        {"step": 2, "val/method/gap": 3.0, "val/new": 1.0},
    ]
    final = {"eval/method/gap": 4.0, "eval/kl": 1.0}
    run = write_run(tmp_path / "run", history__jsonl=logged, metrics__json=final)
    shipped = load_spec()
    dashboard = shipped.with_metrics_of(read_run(run))
    assert dashboard.sections[:-1] == shipped.sections
    gap = Curves("method/gap", ("method/gap",))
    assert dashboard.sections[-1] == Section(
        "Further curves", (gap, Curves("new", ("new",)), Bars("method/gap", ("eval/method/gap",)))
    )
    assert gap.keys == ("train/method/gap", "val/method/gap")
    assert dashboard.with_metrics_of(read_run(run)) == dashboard
    charts = Page(render_report(run)).charts
    assert [one["values"] for one in charts["method/gap"]["series"]] == [[2.0], [3.0]]


# --- what is logged ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Train shipped compositions that together log every metric."""
    folder, cache = tmp_path_factory.mktemp("logged"), shared_cache(tmp_path_factory)
    few = ("trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=2")
    compositions = {
        "stories": (TINY, "callbacks=samples", "alpha=linear", "beta=linear"),
        "enumerable": ("data=enumerable", "model=tabular", "evaluation=quick", "probe.num_prompts=2"),
    }
    for name, words in compositions.items():
        job(folder / name, cache, *words, *few)
    return [folder / name for name in compositions]


def test_every_metric_of_the_shipped_dashboard_is_logged(runs: list[Path]) -> None:
    logged = {key for run in runs for row in rows(run / "history.jsonl") for key in row if row[key] is not None}
    final = {key for run in runs for key in numbers(run)}
    for section in load_spec().sections:
        for panel in section.panels:
            assert set(panel.keys) <= (logged if isinstance(panel, Curves) else final), panel


def test_every_curve_is_drawn_under_its_section(runs: list[Path]) -> None:
    pages = [Page(render_report(run)) for run in runs]
    headings = [(tag, text) for page in pages for tag in ("h3", "h4") for text in page.data.get(tag, [])]
    shown = {(tag, re.sub(r"\s+", " ", text).strip()) for tag, text in headings}
    for section in load_spec().sections:
        assert not section.curves or ("h3", section.title) in shown
        for curves in section.curves:
            assert ("h4", curves.title) in shown, curves.title


def test_shipped_dashboard_shows_almost_every_logged_metric(runs: list[Path]) -> None:
    """Check that a new metric gets a place in the dashboard file, instead of among the further curves."""
    known = load_spec().keys
    logged = {key for row in rows(runs[0] / "history.jsonl") for key in row if key.startswith(("train/", "val/"))}
    assert len(logged - known) < 12, sorted(logged - known)


# --- W&B -----------------------------------------------------------------------------------------------------------


def sent(view: ws.Workspace) -> dict[str, Any]:
    """Return what a server is sent."""
    spec: dict[str, Any] = view._to_model().model_dump(by_alias=True, exclude_none=True)["spec"]["section"]
    return spec


def test_workspace_of_one_method_has_every_section_and_panel() -> None:
    dashboard = load_spec()
    view = workspace(dashboard, "someone", "spo", group_by="method.name", methods=["spo"])
    assert (view.name, view.entity, view.project) == (f"{dashboard.title}: spo", "someone", "spo")
    assert [section.name for section in view.sections] == [section.title for section in dashboard.sections]
    spec = sent(view)
    assert [one["name"] for one in spec["runSets"][0]["grouping"]] == ["method.value.name"]
    [found] = spec["runSets"][0]["filters"]["filters"]
    assert (found["key"], found["op"], found["value"]) == ({"section": "run", "name": "jobType"}, "IN", ["spo"])
    for section, drawn_section in zip(dashboard.sections, spec["panelBankConfig"]["sections"], strict=True):
        for panel, drawn in zip(section.panels, drawn_section["panels"], strict=True):
            config = drawn["config"]
            assert config.get("chartTitle") == getattr(panel, "title", None)
            if isinstance(panel, Curves):
                assert (config["xAxis"], tuple(config["metrics"])) == ("_step", panel.keys)
                assert (config.get("yAxisMin"), config.get("yAxisMax")) == (panel.bounds or (None, None))
            elif isinstance(panel, Bars):
                assert tuple(config["metrics"]) == panel.final
                assert (config.get("xAxisMin"), config.get("xAxisMax")) == (panel.bounds or (None, None))
            elif isinstance(panel, Scatter):
                assert (config["xAxis"], config["yAxis"]) == (f"summary:{panel.x}", f"summary:{panel.y}")
            elif isinstance(panel, Coordinates):
                assert drawn["viewType"] == "Parallel Coordinates Plot"
                axes = [(one["accessor"], one.get("log", False)) for one in config["columns"]]
                assert axes == [
                    ("config:method.value.name", False),
                    *(
                        (f"config:{key}", True)
                        for key in ("alpha.value.value", "beta.value.value", "optimizer.value.lr")
                    ),
                    ("config:seed.value", False),
                    ("summary:val/win_rate", False),
                ]
            elif isinstance(panel, KeyImportance):
                assert (drawn["viewType"], config["targetKey"]) == ("Parameter Importance", "val/win_rate")
            else:
                assert isinstance(panel, RunTable) and panel.runs == "different"
                assert (drawn["viewType"], config["diffOnly"]) == ("Run Comparer", "split")
    kinds = {type(panel) for section in dashboard.sections for panel in section.panels}
    assert kinds == {Curves, Bars, Scatter, Coordinates, KeyImportance, RunTable}


def test_losses_of_several_methods_are_not_in_one_workspace() -> None:
    dashboard = load_spec()
    for methods in ([], ["spo", "dpo"]):
        view = workspace(dashboard, "someone", "spo", methods=methods)
        spec = sent(view)
        drawn = {key for section in spec["panelBankConfig"]["sections"] for panel in section["panels"] for key in
                 panel["config"].get("metrics", [])}  # fmt: skip
        assert {"train/kl", "val/rewards/accuracies"} <= drawn
        assert not [key for key in drawn if not comparable(key)]
        assert dashboard.keys - drawn >= {"train/loss", "val/loss/regularizer", "val/rewards/margins"}
        assert bool(spec["runSets"][0]["filters"].get("filters")) is bool(methods)
        assert spec["runSets"][0].get("grouping", []) == []
        left = ["Loss", "Preference loss", "Regularizer", "Implicit reward", "Implicit reward margin"]
        assert left_out(dashboard, methods, report=False) == left and "Loss" not in [one.name for one in view.sections]
        assert left_out(dashboard, methods, report=True) == ([] if methods else left)
    assert left_out(dashboard, ["spo"], report=False) == []


def test_axis_titles_show_unit_and_baseline() -> None:
    panels = (
        Curves("a", ("kl",)),
        Curves("b", ("tv",), ("exact",)),
        Bars("c", ("eval/win_rate",), baseline=0.5),
    )
    [section] = workspace(Dashboard("D", (Section("S", panels),)), "someone", "spo").sections
    assert [section.panels[0].title_y, section.panels[1].title_y] == ["nats per sequence", None]
    assert section.panels[2].title_x == "share of prompts, compare with 0.5"


def test_report_has_the_same_panels_side_by_side() -> None:
    dashboard = load_spec()
    found = report(dashboard, "someone", "spo", group_by="method.name", methods=["spo", "dpo"])
    assert [block.text for block in found.blocks if isinstance(block, wr.H2)] == [s.title for s in dashboard.sections]
    heading, drawn = "", []
    for block in found.blocks:
        if isinstance(block, wr.H2 | wr.H3):
            heading = str(block.text)
        elif isinstance(block, wr.PanelGrid):
            [runs] = block.runsets
            drawn.append((heading, [getattr(panel, "title", None) for panel in block.panels], runs.filters))
            places = {(panel.layout.x, panel.layout.y) for panel in block.panels}
            assert len(places) == len(block.panels) and max(x for x, _ in places) <= 16
            assert (runs.project, runs.groupby) == ("spo", ["config.method.name"])
    expected: list[tuple[str, list[str | None], str]] = []
    for section in dashboard.sections:
        # Metrics that are not comparable are in a grid of their own for each method.
        for panels, methods in ((True, ["spo, dpo"]), (False, ["spo", "dpo"])):
            titles = [getattr(one, "title", None) for one in section.panels if is_comparable(one) is panels]
            for names in methods if titles else []:
                place = section.title if panels else f"{section.title}, {names}"
                listed = ", ".join(repr(name) for name in names.split(", "))
                expected.append((place, titles, f'Metric("JobType") in [{listed}]'))
    assert drawn == expected
    every = report(dashboard, "someone", "spo")
    grids = [block for block in every.blocks if isinstance(block, wr.PanelGrid)]
    shown = {key for grid in grids for panel in grid.panels if isinstance(panel, wr.LinePlot) for key in panel.y}
    assert "train/kl" in shown and not [key for key in shown if not comparable(str(key))]


def test_saving_needs_an_api_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    assert cli.main(["dashboard", "someone/spo"]) == 1
    assert "run `wandb login`, or set WANDB_API_KEY" in capsys.readouterr().err
    for words in (["spo"], ["someone/"], ["a/b/c"], []):
        assert cli.main(["dashboard", *words]) == 2
    assert cli.main(["dashboard", "someone/spo", "--spec", "nothing"]) == 1
    assert "there is no dashboard nothing" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [(), ("--report",)])
def test_dashboard_command_saves_a_workspace_or_a_report(
    kind: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved: list[Any] = []
    (tmp_path / "mine.yaml").write_text(OWN)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for view in (ws.Workspace, wr.Report):
        monkeypatch.setattr(view, "save", lambda self: saved.append(self))
        monkeypatch.setattr(view, "url", "https://address")
    run = write_run(tmp_path / "run", history__jsonl=[{"step": 1, "train/method/gap": 2.0}])
    assert cli.main(["dashboard", "someone/spo", str(run), *kind, "--spec", str(tmp_path / "mine.yaml")]) == 0
    out, words = capsys.readouterr()
    assert out == "https://address\n"
    advice = "--method NAME,NAME" if kind else "--method NAME, for a workspace of one method"
    assert f"do not share a scale: Loss of validation. To see them, add {advice}." in words
    assert isinstance(saved[0], wr.Report if kind else ws.Workspace)
    assert "train/method/gap" in str(saved[0])
    assert cli.main(["dashboard", "someone/spo", str(tmp_path / "nowhere"), *kind]) == 1
    assert "nowhere is not a directory" in capsys.readouterr().err
    assert (saved[0].title if kind else saved[0].name) == "Mine"

    def refuse(self: Any) -> None:
        raise RuntimeError("project not found")

    monkeypatch.setattr(wr.Report if kind else ws.Workspace, "save", refuse)
    assert cli.main(["dashboard", "someone/spo", *kind]) == 1
    assert "W&B rejected the dashboard for someone/spo: project not found" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["api.wandb.ai", "wandb.example.com", urlsplit(wandb.Settings().base_url).netloc])
def test_api_key_of_the_server_is_found(host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine github.com\n  login user\n  password key\n")
    assert not has_api_key()
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password key\n")
    assert has_api_key()


def test_report_command_accepts_a_dashboard_file(
    runs: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(OWN)
    assert cli.main(["report", str(runs[0]), "--spec", str(tmp_path / "mine.yaml")]) == 0
    assert "Loss of validation" in Page(Path(capsys.readouterr().out.strip())).text
    assert cli.main(["report", str(runs[0]), "--spec", "nothing"]) == 1
