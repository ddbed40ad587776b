"""The catalogue of metrics: one entry shows a new metric everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spo.comparison.compare import compare
from spo.comparison.runs import find_runs
from spo.metrics import catalogue
from spo.metrics.catalogue import SHARE, Metric, column, find, find_logged, label, markdown_table, rank, unit
from spo.pages.comparison_files import to_csv
from spo.pages.comparison_page import write_page
from spo.pages.comparison_table import print_comparison
from spo.pages.dashboard import Bars, load_spec
from spo.pages.panels import result_panel
from spo.pages.run_page import render_report
from spo.stats import Bootstrap
from tests.comparison_runs import write_sweep
from tests.test_reports import Page

RHYMES = Metric(
    "rhymes",
    "rhyming lines",
    "share of lines",
    better="higher",
    bounds=SHARE,
    places=("card", "terminal", "comparison"),
    per_sample=column("rhymes"),
)


def test_one_entry_shows_a_new_metric_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "CATALOGUE", [*catalogue.CATALOGUE[:2], RHYMES, *catalogue.CATALOGUE[2:]])
    sweep = write_sweep(tmp_path, seeds=(1,))
    for run_dir in sweep.iterdir():
        rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
        for place, row in enumerate(rows):
            row["rhymes"] = 0.25 + 0.5 * (place % 2)
        (run_dir / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        metrics = json.loads((run_dir / "metrics.json").read_text()) | {"eval/rhymes": 0.5}
        (run_dir / "metrics.json").write_text(json.dumps(metrics))

    page = Page(render_report(run_dir))
    assert "rhyming lines" in page.data["dt"] and "rhyming lines" in page.data["th"]
    result_panel(metrics, rows, run_dir)
    assert "rhyming lines" in capsys.readouterr().out

    comparison = compare(find_runs([sweep]), metric="eval/rhymes", bootstrap=Bootstrap(draws=200))
    assert comparison.higher is True
    estimate = comparison.methods[0].estimates["rhymes"]
    assert estimate.low is not None and 0.25 < estimate.low < 0.5  # from the values of single completions
    print_comparison(comparison)
    assert "rhyming lines" in capsys.readouterr().out
    assert "Rhyming lines" in Page(write_page(comparison, tmp_path / "out")).text
    assert {"rhymes", "rhymes_low", "rhymes_high"} <= set(to_csv(comparison).splitlines()[0].split(","))

    assert "| `rhymes` | rhyming lines | share of lines | higher | 0 to 1 |" in markdown_table().splitlines()
    panels = [panel for section in load_spec().sections for panel in section.panels]
    assert Bars("Rhyming lines", ("eval/rhymes",), SHARE) in panels


def test_family_entry_matches_its_members() -> None:
    assert label("reward/good_end") == "reward: good end"
    assert label("win_rate/chosen") == "win rate against chosen"
    assert label("win_rate/run_2_length_controlled") == "win rate against run_2, at equal length"
    assert label("prompts/chosen") == "prompts compared with chosen"
    assert label("judge/calls") == "judge calls" and label("judge/retries") == "judge: retries"
    assert unit("win_rate/chosen_length_controlled") == "share of prompts"
    assert find("rewards/unheard_of") is None and label("rewards/unheard_of") == "rewards/unheard_of"


def test_logged_key_prefers_the_entry_with_its_prefix() -> None:
    assert [find_logged(key).key for key in ("eval/kl", "train/kl", "exact/entropy")] == ["kl", "kl", "exact/entropy"]  # type: ignore[union-attr]
    assert find_logged("eval/reward/plot").key == "reward/NAME"  # type: ignore[union-attr]
    assert find_logged("time/total_s") is None


def test_rank_keeps_families_together_and_unknown_metrics_last() -> None:
    ordered = [
        "win_rate",
        "win_rate_length_controlled",
        "win_rate/a",
        "win_rate/a_length_controlled",
        "win_rate/b",
        "win_rate/b_length_controlled",
        "reward",
        "reward/plot",
        "kl",
        "rewards/accuracies",
        "own_metric",
    ]
    assert sorted(reversed(ordered), key=rank) == ordered


def test_keys_are_unique_and_ranges_increase() -> None:
    keys = [entry.key for entry in catalogue.CATALOGUE]
    assert len(set(keys)) == len(keys)
    assert all(entry.label for entry in catalogue.CATALOGUE)
    assert all(entry.bounds is None or entry.bounds[0] < entry.bounds[1] for entry in catalogue.CATALOGUE)


def test_catalogue_imports_neither_torch_nor_hydra() -> None:
    code = "import sys, spo.metrics.catalogue; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "numpy", "omegaconf"} & set(done.stdout.split())
