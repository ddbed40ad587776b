"""The notebooks: as they are committed, and executed from top to bottom."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from spo import load_runs
from tests.environments import ROOT
from tests.test_study_figures import write_study

FOLDER = ROOT / "notebooks"
# The outputs are part of the documentation, so every notebook is committed with them.
SHOWN = ("01_quickstart.ipynb", "02_softness.ipynb", "03_compare.ipynb")
MAX_NOTEBOOK_CHARACTERS = 300_000
MAX_PRINTED_LINES = 20  # of one cell; longer ones are logs
# "/tmp/run", "file:///home/me" or "C:\\Users", but not a relative path such as "../data/pairs".
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.<])/(?:data|home|mnt|opt|private|root|srv|tmp|usr|var|work|Users)\b|\b[A-Z]:\\\\\w\w"
)


def read(file: Path) -> Any:
    return nbformat.read(file, as_version=4)


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def numbers(notebook: Any) -> dict[str, Any]:
    """Return the text that the last cell prints."""
    return json.loads(notebook.cells[-1].outputs[0].text)


def execute(name: str, folder: Path, **changes: str) -> Any:
    """Run a notebook in a folder, with some lines of its settings replaced."""
    notebook = read(FOLDER / name)
    for cell in code_of(notebook):
        cell.outputs, cell.execution_count = [], None
    for old, new in changes.items():
        lines = [cell for cell in code_of(notebook) if re.search(rf"^{old} = ", cell.source, re.MULTILINE)]
        assert len(lines) == 1
        lines[0].source = re.sub(rf"^{old} = .*$", f"{old} = {new}", lines[0].source, flags=re.MULTILINE)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
    return notebook


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code_of(notebook) for output in cell.outputs)


def test_the_notebooks_are_listed() -> None:
    assert tuple(sorted(file.name for file in FOLDER.glob("*.ipynb"))) == SHOWN


@pytest.mark.parametrize("name", SHOWN)
def test_notebooks_are_valid_small_and_portable(name: str) -> None:
    text = (FOLDER / name).read_text()
    nbformat.validate(read(FOLDER / name))
    assert len(text) < MAX_NOTEBOOK_CHARACTERS
    assert not ABSOLUTE_PATH.search(text)
    for cell in code_of(read(FOLDER / name)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("spo."):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("name", SHOWN)
def test_a_committed_notebook_shows_its_results(name: str) -> None:
    code = code_of(read(FOLDER / name))
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert pictures(read(FOLDER / name))
    assert max(len(output.get("text", "").splitlines()) for output in outputs) <= MAX_PRINTED_LINES


def check_softness(found: dict[str, Any]) -> None:
    assert found["entropy"] == sorted(found["entropy"]) and found["stories"] == sorted(found["stories"])
    assert found["entropy"] == pytest.approx(found["predicted"], abs=1e-3)
    assert found["controlled"] == pytest.approx(0.9, rel=0.05)


def test_softness_outputs_match_their_claims() -> None:
    check_softness(numbers(read(FOLDER / "02_softness.ipynb")))


def test_quickstart_outputs_match_their_claims() -> None:
    notebook = read(FOLDER / "01_quickstart.ipynb")
    found = numbers(notebook)
    text = "".join(output.get("text", "") for cell in code_of(notebook) for output in cell.outputs)
    assert found["samples"] == 256 and found["spo"] > 0.5 and found["dpo"] > 0.5
    assert f"win rate against the reference: {found['spo']:.2f}," in text


def test_comparison_outputs_match_their_claims() -> None:
    found = numbers(read(FOLDER / "03_compare.ipynb"))
    assert set(found["best"]) == set(found["values"]) == {"spo", "dpo", "ipo"}
    values = found["values"].values()
    assert min(values) > 0.5 and max(values) - min(values) == pytest.approx(0.01, abs=0.005)
    assert found["significant"] == []


@pytest.mark.slow
def test_softness_runs_from_top_to_bottom(tmp_path: Path) -> None:
    check_softness(numbers(execute("02_softness.ipynb", tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_quickstart_runs_from_top_to_bottom(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPO_CACHE_DIR", str(cache_dir))
    notebook = execute("01_quickstart.ipynb", tmp_path, SIZE='["+debug=tiny"]')
    found, runs = numbers(notebook), tmp_path / "outputs" / "quickstart"
    assert pictures(notebook) == 3
    assert {name: found[name] for name in ("spo", "dpo")} == {
        name: json.loads((runs / name / "metrics.json").read_text())["eval/win_rate"] for name in ("spo", "dpo")
    }
    assert found["samples"] == len((runs / "spo" / "samples.jsonl").read_text().splitlines())
    assert (runs / "spo" / "report.html").exists()


@pytest.mark.slow
def test_compare_runs_from_top_to_bottom(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPO_CACHE_DIR", str(cache_dir))
    grid = {"SPO": '["alpha=0.1", "alpha=1"]', "DPO": '["beta=0.1", "beta=1"]', "IPO": '["beta=1", "beta=3"]'}
    study = write_study(tmp_path / "outputs" / "sweeps" / "study" / "few_pairs_data-0")
    notebook = execute("03_compare.ipynb", tmp_path, SIZE='["+debug=tiny"]', SEEDS="[1, 2]", **grid)
    found, runs = numbers(notebook), tmp_path / "outputs" / "compare"
    assert pictures(notebook) == 5
    assert (runs / "comparison" / "comparison.html").exists()
    assert set(found["best"]) == {"spo", "dpo", "ipo"}
    for method, setting in found["best"].items():
        folders = [runs / f"{method}_{setting.replace(' ', '-')}_seed-{seed}" for seed in (1, 2)]
        rates = [json.loads((folder / "metrics.json").read_text())["eval/win_rate"] for folder in folders]
        assert found["values"][method] == pytest.approx(sum(rates) / 2)
    table = load_runs(study).groupby(["method.name", "regularizer._target_"])["eval/win_rate"].mean()
    assert found["study"] == {
        f"few_pairs_data-0, {method}": pytest.approx(
            table[method, "spo.regularizers.GlobalKL"] - table[method, "spo.regularizers.LocalKL"]
        )
        for method in ("spo", "dpo")
    }
