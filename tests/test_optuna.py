"""Searches: distributions of the override grammar, the best trial, and interruptions, which cost nothing."""

from __future__ import annotations

import inspect
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from spo import cli
from spo.config.compose import compose, composer, parse
from spo.config.search_space import Space
from spo.errors import UserError
from spo.records.files import write_json
from spo.runs.ledger import Ledger
from spo.runs.optuna_sweeper import OptunaSweeper
from tests.commands import history, numbers, shared_cache, spo
from tests.test_sweeps import FAST, STEPS, start, until


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_cache(tmp_path_factory)


@pytest.fixture
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPO_CACHE_DIR", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


# --- the space -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "drawn", "ends"),
    [
        ("interval(0.01,1.0)", FloatDistribution(0.01, 1.0), ["0.01", "1.0"]),
        ("tag(log, interval(0.01,1.0))", FloatDistribution(0.01, 1.0, log=True), ["0.01", "1.0"]),
        ("int(interval(1,8))", IntDistribution(1, 8), ["1", "8"]),
        ("range(2,9,2)", IntDistribution(2, 8, step=2), ["2", "8"]),
        ("range(0.5,2.0,0.5)", FloatDistribution(0.5, 1.5, step=0.5), ["0.5", "1.5"]),
        ("0.1,0.3,1", CategoricalDistribution(["0.1", "0.3", "1"]), ["0.1", "0.3", "1"]),
        ("choice(linear,cosine)", CategoricalDistribution(["linear", "cosine"]), ["linear", "cosine"]),
    ],
)
def test_override_grammar_defines_distributions(value: str, drawn: object, ends: list[str]) -> None:
    space = Space.of({"beta.value": value}, ["seed=1"], [])
    assert space.distributions() == {"beta.value": drawn}
    assert space.ends("beta.value") == ends
    assert [job[-1] for job in space.corners()] == ["seed=1"] * len(ends)
    assert [job[0] for job in space.corners()] == [f"beta.value={end}" for end in ends]
    for job in space.corners():
        assert not any(parse(text).is_sweep_override() for text in job)


def test_command_line_replaces_searched_keys() -> None:
    params = {"beta.value": "interval(0.1,1.0)", "alpha.value": "interval(0.1,1.0)"}
    space = Space.of(params, ["beta.value=0.3", "optimizer.lr=0.1,0.2", "hydra.sweeper.n_trials=3"], [])
    assert (space.fixed, list(space.varied)) == (["beta.value=0.3"], ["alpha.value", "optimizer.lr"])


def test_unused_coefficients_are_not_searched() -> None:
    params = {"beta.value": "interval(0.1,1.0)", "alpha.value": "interval(0.1,1.0)"}
    assert list(Space.of(params, ["method=dpo"], ["alpha"]).varied) == ["beta.value"]
    assert list(Space.of(params, ["method=spo,dpo"], ["alpha"]).varied) == ["beta.value", "alpha.value", "method"]


def test_yaml_keys_match_the_sweeper() -> None:
    with composer() as composed:
        node = composed(["hparams_search=optuna"]).hydra.sweeper
    assert set(node) - {"_target_", "_recursive_"} == set(inspect.signature(OptunaSweeper).parameters)
    assert set(node.sampler) - {"_target_"} <= set(inspect.signature(optuna.samplers.TPESampler).parameters)


def test_problems_of_a_search_are_reported_before_it_starts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "hparams_search=optuna", "hydra.sweeper.n_trials=0", "hydra.sweeper.objective.direction=up"]
    words += ["hydra.sweeper.objective.metric=eval/win_rate", "++hydra.sweeper.objective.constraints={eval/kl:1}"]
    assert cli.main([*words, "optimizer.lr=interval(-1.0,1.0)"]) == 1
    message = capsys.readouterr().err
    assert "hydra.sweeper.n_trials=0: must be a whole number" in message
    assert "direction=up: choose maximize or minimize" in message
    assert "eval/win_rate cannot be searched for" in message and "eval/kl cannot be searched for" in message
    assert "optimizer.lr=-1.0: must be a positive number" in message
    assert cli.main(["train", "hparams_search=optuna", "optimizer.lr=tag(log,interval(0.0,1.0))"]) == 1
    assert "optimizer.lr=tag(log,interval(0.0,1.0)): " in capsys.readouterr().err
    assert list(here.iterdir()) == []


# --- the loop, on a function whose optimum is known ----------------------------------------------------------------


class Formula:
    """A launcher whose jobs score ``-(log10 lr + 2)^2`` at a kl of ``3 + log10 lr``; chosen jobs fail."""

    def __init__(self, directory: Path, fails: Callable[[int], bool] = lambda number: False) -> None:
        self.directory, self.ledger, self.fails = directory, Ledger(directory), fails
        self.launched: list[list[str]] = []

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> None:
        for job in jobs:
            self.launched.append(list(job))
            number = len(self.launched) - 1
            if self.fails(number):
                self.ledger.note(job, f"job-{number}", "failed", "the disc is full")
                continue
            [lr] = [float(text.partition("=")[2]) for text in job if text.startswith("optimizer.lr=")]
            metrics = {"val/win_rate": -((math.log10(lr) + 2) ** 2), "val/kl": 3 + math.log10(lr)}
            (self.directory / f"job-{number}").mkdir(exist_ok=True)
            write_json(self.directory / f"job-{number}" / "metrics.json", metrics)
            self.ledger.note(job, f"job-{number}", "finished")


class Dies(Exception):
    """The death of the process."""


def search(
    directory: Path,
    trials: int,
    jobs: int = 1,
    fails: Any = lambda number: False,
    plugins: dict[str, str] | None = None,
    **objective: Any,
) -> Formula:
    """Run a search over the learning rate, or resume it."""
    wanted = {"metric": "val/win_rate", "direction": "maximize", "constraints": {}, **objective}
    sweeper = OptunaSweeper(
        trials,
        jobs,
        0,
        OmegaConf.create(wanted),
        OmegaConf.create({"optimizer.lr": "tag(log, interval(0.0001, 1.0))"}),
        OmegaConf.create({"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 4}),
        f"sqlite:///{directory}/optuna.db",
    )
    formula = Formula(directory, fails)
    sweeper.directory, sweeper.ledger, sweeper.launcher, sweeper.unused = directory, formula.ledger, formula, []
    sweeper.plugins = plugins or {}
    sweeper.sweep([])
    return formula


def result(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "optimization.json").read_text())


def test_search_finds_the_optimum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(tmp_path, 16)
    found = result(tmp_path)
    assert len(found["trials"]) == 16
    assert found["best"]["value"] == max(row["value"] for row in found["trials"]) > -0.02
    assert abs(math.log10(found["best"]["params"]["optimizer.lr"]) + 2) < 0.15
    shown = capsys.readouterr().out
    assert f"best of 16: optimizer.lr={found['best']['params']['optimizer.lr']}" in shown


def test_best_trial_satisfies_constraints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(tmp_path, 16, constraints={"val/kl": 0.5})  # lr of at most 10^-2.5, where the value is -0.25
    found = result(tmp_path)
    best = found["best"]
    assert best["constraints"]["val/kl"] <= 0.5 and best["feasible"]
    assert -0.4 < best["value"] <= -0.25 < max(row["value"] for row in found["trials"])
    assert "out of bounds" in capsys.readouterr().out


def test_interrupted_search_resumes_with_the_same_proposals(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    search(tmp_path / "whole", 8)

    def dies(number: int) -> bool:
        if number == 3:
            raise Dies
        return False

    with pytest.raises(Dies):
        search(tmp_path / "broken", 8, fails=dies)
    again = search(tmp_path / "broken", 8)
    assert len(again.launched) == 5
    whole, broken = result(tmp_path / "whole")["trials"], result(tmp_path / "broken")["trials"]
    assert [row["params"] for row in broken] == [row["params"] for row in whole]
    assert [row["value"] for row in broken] == [row["value"] for row in whole]
    assert search(tmp_path / "broken", 8).launched == []
    assert len(search(tmp_path / "broken", 10).launched) == 2


def test_failed_trial_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formula = search(tmp_path, 6, jobs=2, fails=lambda number: number in (1, 4))
    assert len(formula.launched) == 6
    rows = result(tmp_path)["trials"]
    assert [row["state"] for row in rows] == ["complete", "fail", "complete", "complete", "fail", "complete"]
    assert rows[1]["error"] == "the disc is full" and rows[1]["value"] is None and not rows[1]["feasible"]
    assert "failed: trial 4: the disc is full" in capsys.readouterr().out


def test_missing_metric_fails_the_trial_with_a_message(tmp_path: Path) -> None:
    search(tmp_path, 1, metric="val/reward")
    [row] = result(tmp_path)["trials"]
    assert row["error"] == "its metrics do not have a finite val/reward; they have val/kl, val/win_rate"
    assert result(tmp_path)["best"] is None and Ledger(tmp_path).entries()[0].status == "failed"


def test_another_search_in_the_directory_is_rejected(tmp_path: Path) -> None:
    search(tmp_path, 1)
    with pytest.raises(UserError, match="holds another search"):
        search(tmp_path, 1, direction="minimize")
    with pytest.raises(UserError, match=r"(?s)holds another search.*mypkg"):
        search(tmp_path, 1, plugins={"mypkg": "0"})


# --- the command ---------------------------------------------------------------------------------------------------

SEARCH = (
    "hparams_search=optuna",
    "method=dpo",
    "hydra.sweeper.objective={metric:val/rewards/margins,constraints:{val/kl:5}}",
    "beta=tag(log,interval(0.1,3.0))",
    "optimizer.lr=0.1",
    *FAST,
    "hydra.sweep.dir=sweep",
)


def test_search_from_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *SEARCH, "hydra.sweeper.n_trials=2"]) == 0
    assert "best of 2: beta.value=" in capsys.readouterr().out
    found = result(here / "sweep")
    assert [row["state"] for row in found["trials"]] == ["complete"] * 2
    for row in found["trials"]:
        metrics = numbers(here / "sweep" / row["directory"])
        assert (metrics["val/rewards/margins"], metrics["val/kl"]) == (row["value"], row["constraints"]["val/kl"])
        assert list(row["params"]) == ["beta.value"] and row["directory"].startswith("beta.value-")
    assert {entry.status for entry in Ledger(here / "sweep").entries()} == {"finished"}


@pytest.mark.slow
def test_killed_parallel_search_runs_every_trial_once(here: Path, cache: Path) -> None:
    words = ["train", *SEARCH, "launcher=joblib", "hydra.sweeper.n_trials=4"]
    process = start(words, here, cache)
    until(lambda: len(list(here.glob("sweep/*/checkpoints/last.ckpt"))) >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    spo(*words, folder=here, cache=cache)
    rows = result(here / "sweep")["trials"]
    assert [row["state"] for row in rows] == ["complete"] * 4
    assert len({row["directory"] for row in rows}) == 4
    for row in rows:
        assert [step["step"] for step in history(here / "sweep" / row["directory"])] == list(range(STEPS + 1))


# --- equal budgets -------------------------------------------------------------------------------------------------


def test_presets_give_every_method_the_same_number_of_trials() -> None:
    settings, seeds = {}, {}
    for method in ("spo", "dpo", "ipo"):
        with composer() as composed:
            hydra = composed(["experiment=baselines/stories", f"hparams_search={method}"]).hydra
        assert hydra.sweep.dir == "outputs/sweeps/stories" and hydra.sweeper.params.method == method
        values = {key: str(value).split(",") for key, value in hydra.sweeper.params.items()}
        seeds[method] = values.pop("seed")
        settings[method] = math.prod(len(set(options)) for options in values.values())
    assert set(settings.values()) == {9} and all(seed == ["1", "2", "3"] for seed in seeds.values())


@pytest.mark.parametrize("method", ["spo", "dpo", "ipo"])
def test_presets_include_the_default_setting(method: str) -> None:
    default = compose([f"method={method}"])
    with composer() as composed:
        params = composed([f"hparams_search={method}"]).hydra.sweeper.params
    for key, value in params.items():
        if key not in ("method", "seed"):
            assert OmegaConf.select(default, key) in map(float, str(value).split(","))
