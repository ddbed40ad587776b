"""The stable Python interface: what it imports, and that it does what the commands do."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest

import spo
from spo.errors import UserError
from tests.comparison_runs import write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "sweep"
    write_sweep(folder, seeds=(1, 2))
    return folder


def test_import_loads_no_library() -> None:
    code = "import sys, spo; dir(spo); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "omegaconf", "transformers", "lightning", "numpy"} & set(done.stdout.split())


def test_every_public_name_exists_and_others_do_not() -> None:
    assert set(spo.__all__) <= set(dir(spo))
    assert all(callable(getattr(spo, name)) for name in spo.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = spo.trian  # type: ignore[attr-defined]


def test_compose_is_the_configuration_of_the_command(tmp_path: Path) -> None:
    cfg = spo.compose(["method=dpo", "beta=0.2"], run_dir=tmp_path / "run")
    assert (cfg.method.name, cfg.beta.value, cfg.paths.run) == ("dpo", 0.2, str(tmp_path / "run"))
    with pytest.raises(UserError, match="names and numbers are mixed"):
        spo.compose(["beta=linear,0.2"])


def test_load_run_reads_the_files_of_a_run(sweep: Path) -> None:
    directory = next(path.parent for path in sorted(sweep.rglob("metrics.json")))
    run = spo.load_run(str(directory))
    assert run.metrics == json.loads((directory / "metrics.json").read_text())
    assert run.config["method"]["name"] in directory.name
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        spo.load_run(sweep / "nowhere")


def test_load_runs_has_a_row_per_run_with_configuration_and_metrics(sweep: Path) -> None:
    table = spo.load_runs(sweep)
    directories = [path.parent for path in sorted(sweep.rglob("metrics.json"))]
    assert isinstance(table, pandas.DataFrame)
    assert sorted(table["run"]) == [str(directory) for directory in directories]
    for row in table.to_dict("records"):
        metrics = json.loads((Path(row["run"]) / "metrics.json").read_text())
        assert row["eval/win_rate"] == metrics["eval/win_rate"]
        assert row["method.name"] in row["run"] and row["seed"] in (1, 2)
    assert len(spo.load_runs([directories[0], directories[1]])) == 2
    with pytest.raises(UserError, match="there is no such directory"):
        spo.load_runs(sweep / "nowhere")


def test_load_runs_without_pandas_is_a_list_of_dictionaries(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_pandas(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name="pandas")
        return original(name, *args, **kwargs)

    expected = spo.load_runs(sweep).to_dict("records")
    monkeypatch.setattr(builtins, "__import__", without_pandas)
    rows = spo.load_runs(sweep)
    assert isinstance(rows, list)
    assert [row["run"] for row in rows] == [row["run"] for row in expected]


def test_compare_returns_what_the_command_shows(sweep: Path) -> None:
    comparison = spo.compare(sweep)
    assert comparison.metric == "eval/win_rate" and len(comparison.methods) > 1
    assert not (sweep / "comparison").exists()
    name = comparison.methods[-1].name
    assert spo.compare([sweep], baseline=name).baseline == name
