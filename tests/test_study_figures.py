"""The figures of docs/study.md: their numbers on synthetic runs are those of ``spo.compare``."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import spo
from spo.comparison import compare
from tests.comparison_runs import write_run
from tests.environments import ROOT

PNG = b"\x89PNG\r\n\x1a\n"
TARGETS = {"global_kl": "GlobalKL", "local_kl": "LocalKL", "none": "NoRegularizer"}
LIFTS = {"global_kl": 0.9, "local_kl": 0.2, "none": 0.1}
VALIDATIONS = (20, 40, 60)


@pytest.fixture(scope="module")
def figures() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module("figures")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimate all intervals from few resamples, which is fast."""
    monkeypatch.setattr(compare, "Bootstrap", partial(compare.Bootstrap, draws=200))


def write_study(folder: Path, *, data_seed: int = 0, rates: tuple[float, ...] = (0.003,)) -> Path:
    """Write the runs of two methods with three regularizers and two seeds, with samples at three validations."""
    for method in ("spo", "dpo"):
        for regularizer, gain in LIFTS.items():
            lift = gain if method == "spo" else 1.1 - gain  # The other order, so that the local KL is better for DPO.
            for rate in rates:
                for seed in (1, 2):
                    arm = folder / f"{regularizer}_{rate}"
                    changes = {"regularizer._target_": f"spo.regularizers.{TARGETS[regularizer]}"}
                    changes |= {"optimizer.lr": rate, "data.seed": data_seed}
                    settings = {"lift": lift + 20 * rate, "prompts": 24, "changes": changes}
                    run = write_run(arm, method=method, seed=seed, beta=0.1 + lift, **settings)
                    with (run / "history.jsonl").open("a") as file:
                        for step in VALIDATIONS:
                            row = {"step": step, "val/samples/win_rate": 0.5 + step / 200 + lift / 10 + seed / 100}
                            file.write(json.dumps({**row, "val/samples/kl": step * lift * seed}) + "\n")
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study") / "few_pairs_data-0")


def drawn(figures: Any, folder: Path, name: str, *sweeps: Path, file_name: str) -> None:
    file = figures.main([name, *map(str, sweeps), "--out", str(folder)])
    assert file == folder / file_name
    assert file.read_bytes()[:8] == PNG and 5_000 < file.stat().st_size < 120_000


def test_paths_are_means_over_seeds(
    figures: Any, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn(figures, tmp_path, "study_paths", sweep, file_name="study_paths_few_pairs_data-0.png")
    out = capsys.readouterr().out
    assert "SPO + global KL, win_rate over steps: 20: 0.705, 40: 0.805, 60: 0.905" in out
    assert "DPO + local KL, kl over steps: 20: 27.000, 40: 54.000, 60: 81.000" in out
    assert "DPO, kl over steps: 20: 30.000" in out


def test_table_has_the_numbers_and_the_costs_of_each_arm(figures: Any, sweep: Path) -> None:
    study = figures.study_figures.read_study(sweep)
    assert [arm.name for arm in study.arms] == [
        f"{method}{words}" for method in ("SPO", "DPO") for words in (" + global KL", " + local KL", "")
    ]
    arm = study.arms[0]
    cells = [cell.strip() for cell in arm.row().strip("|").split("|")]
    metrics = [json.loads((run.path / "metrics.json").read_text()) for run in arm.group.best.runs]
    assert len(cells) == study_columns(figures) and cells[-1] == "2"
    assert cells[2].split()[0] == f"{sum(one['eval/win_rate'] for one in metrics) / 2:.3f}"
    assert cells[3].split()[0] == f"{sum(one['eval/kl'] for one in metrics) / 2:.1f}"
    assert cells[-3:-1] == ["unknown", f"{sum(one['trained/sampled_tokens'] for one in metrics) / 2:,.0f}"]


def study_columns(figures: Any) -> int:
    return figures.study_figures.HEADER.splitlines()[0].count("|") - 1


def test_regimes_show_the_differences_of_the_comparison(
    figures: Any, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_study(tmp_path / "few_pairs_data-1", data_seed=1)
    drawn(figures, tmp_path / "images", "study_regimes", sweep, other, file_name="study_regimes.png")
    out = capsys.readouterr().out
    for metric, words, digits in (("win_rate", "win rate", 3), ("kl", "KL (nats per sequence)", 1)):
        comparison = spo.compare(sweep, by=("method", "regularizer"), metric=f"eval/{metric}")
        pairs = {(one.first, one.second): one.estimate for one in comparison.differences}
        for method in ("spo", "dpo"):
            names = (f"{method}, global_kl", f"{method}, local_kl")
            if names in pairs:
                value, low, high = pairs[names].value, pairs[names].low, pairs[names].high
            else:
                found = pairs[names[::-1]]
                value, low, high = -found.value, -found.high, -found.low
            expected = f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            assert f"few pairs, data.seed 0, {method.upper()}, {words}: global minus local {expected}" in out
    assert "few pairs, data.seed 1, DPO, win rate: global minus local" in out
    runs = spo.load_runs(sweep)
    rates = runs.groupby(["method.name", "regularizer._target_"])["eval/win_rate"].mean()
    study = figures.study_figures.read_study(sweep, metrics=("win_rate", "kl"))
    for method, sign in (("spo", 1), ("dpo", -1)):
        expected = rates[method, "spo.regularizers.GlobalKL"] - rates[method, "spo.regularizers.LocalKL"]
        assert study.difference("win_rate", method).value == pytest.approx(expected) and sign * expected > 0.05
    assert study.difference("kl", "ipo") is None


def test_frontier_has_a_panel_for_each_regime(
    figures: Any, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_study(tmp_path / "learning_rate_data-1", data_seed=1, rates=(0.001, 0.01))
    drawn(figures, tmp_path / "images", "study_frontier", sweep, other, file_name="study_frontier.png")
    out = capsys.readouterr().out
    assert "few pairs, data.seed 0" in out and "learning rate, data.seed 1" in out
    assert out.count("| SPO + global KL |") == 2 and "| optimizer.lr 0.01 |" in out


def test_learning_rate_has_an_estimate_for_each_rate(figures: Any, tmp_path: Path) -> None:
    sweep = write_study(tmp_path / "learning_rate", rates=(0.001, 0.01))
    drawn(figures, tmp_path / "images", "study_learning_rate", sweep, file_name="study_learning_rate_learning_rate.png")
    study = figures.study_figures.read_study(sweep, "optimizer.lr")
    assert [arm.group.best.runs[0].setting["optimizer.lr"] for arm in study.arms] == [0.001, 0.01] * 6
    assert [arm.setting for arm in study.arms[:2]] == ["optimizer.lr 0.001", "optimizer.lr 0.01"]
    assert all(len(arm.group.best.runs) == 2 and arm.group.estimates["win_rate"].low for arm in study.arms)


def test_mixed_data_seeds_and_missing_samples_are_reported(figures: Any, sweep: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "plain", changes={"regularizer._target_": "spo.regularizers.GlobalKL"})
    with pytest.raises(SystemExit, match="callbacks=samples"):
        figures.main(["study_paths", str(tmp_path / "plain"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="both the global and the local KL"):
        figures.main(["study_regimes", str(tmp_path / "plain"), "--out", str(tmp_path)])
