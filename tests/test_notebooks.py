"""The notebooks as they are committed: executed from top to bottom, and holding what they showed."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.environments import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300_000


def read(file: Path) -> Any:
    return nbformat.read(file, as_version=4)


def numbers(notebook: Any) -> dict[str, Any]:
    """What the last cell prints."""
    return json.loads(notebook.cells[-1].outputs[0].text)


def test_there_are_notebooks() -> None:
    assert [file.name for file in NOTEBOOKS] == ["02_softness.ipynb"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_a_committed_notebook_shows_its_results(file: Path) -> None:
    notebook = read(file)
    nbformat.validate(notebook)
    text = file.read_text()
    assert len(text) < LARGEST
    assert not re.search(r"[\"' (](/tmp|/home|/root|/work|/usr|[A-Z]:\\\\)", text)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for cell in code:
        ast.parse(cell.source)


def check_softness(found: dict[str, Any]) -> None:
    assert found["entropy"] == sorted(found["entropy"]) and found["stories"] == sorted(found["stories"])
    assert found["entropy"] == pytest.approx(found["predicted"], abs=1e-3)
    assert found["controlled"] == pytest.approx(0.9, rel=0.05)


def test_what_softness_shows() -> None:
    check_softness(numbers(read(ROOT / "notebooks" / "02_softness.ipynb")))


@pytest.mark.slow
def test_softness_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = read(ROOT / "notebooks" / "02_softness.ipynb")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()
    check_softness(numbers(notebook))
    assert not list(tmp_path.iterdir())
