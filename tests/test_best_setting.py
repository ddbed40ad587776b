"""The best setting of a method in a finished sweep, which a second sweep reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from spo.config.best_setting import best_setting
from spo.config.compose import compose
from spo.errors import UserError


def write_run(sweep: Path, method: str, strength: float, score: float | None) -> None:
    folder = sweep / f"{method}_{strength}"
    folder.mkdir(parents=True)
    config = {"method": {"name": method}, "strength": strength}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    if score is not None:
        # The test split must not choose: its numbers are in the opposite order.
        (folder / "metrics.json").write_text(json.dumps({"val/win_rate": score, "eval/win_rate": 1 - score}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs/sweeps/all"
    for strength, score in {0.3: 0.6, 1.0: 0.7, 3.0: None}.items():  # The last run has not finished.
        write_run(folder, "dpo", strength, score)
    write_run(folder, "ipo", 3.0, 0.9)
    return folder


def test_selection_split_chooses_among_finished_runs_of_the_method(sweep: Path) -> None:
    found: dict[str, Any] = {method: best_setting(str(sweep), method, "strength") for method in ("dpo", "ipo")}
    assert found == {"dpo": 1.0, "ipo": 3.0}


def test_runs_that_finish_later_count(sweep: Path) -> None:
    assert best_setting(str(sweep), "dpo", "strength") == 1.0
    (sweep / "dpo_3.0/metrics.json").write_text(json.dumps({"val/win_rate": 0.8}))
    assert best_setting(str(sweep), "dpo", "strength") == 3.0


def test_method_without_a_finished_run_is_an_error(sweep: Path) -> None:
    with pytest.raises(UserError, match="does not have a finished run of method=spo with val/win_rate: run that sweep"):
        best_setting(str(sweep), "spo", "strength")


def test_second_sweep_takes_the_strength_of_the_first(sweep: Path) -> None:
    paths = f"paths.outputs={sweep.parents[1]}"
    cfg = compose(["experiment=baselines/all_seeds", "method=ipo", paths])
    assert (cfg.strength, cfg.beta.value) == (3.0, 3 * cfg.method.default_beta)
