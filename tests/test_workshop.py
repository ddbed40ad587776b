"""The files around the package agree: versions, the Makefile, .ci/run, the workflow, templates and CONTRIBUTING."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

import spo
from tests.environments import CONSTRAINTS, ROOT
from tests.test_imports import FILES, imported, part_of

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
CI = (ROOT / ".ci" / "run").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
FORMS = [ROOT / ".github" / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "method.yml")]


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def targets() -> dict[str, list[str]]:
    """Return the commands of each target of the Makefile."""
    rules = re.findall(r"^(\w+):.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    return {name: [line.strip() for line in recipe.splitlines()] for name, recipe in rules}


# --- versions ------------------------------------------------------------------------------------------------------


def test_citation_has_the_version_and_license_of_the_package() -> None:
    citation = read_yaml("CITATION.cff")
    assert (citation["version"], citation["license"]) == (spo.__version__, PYPROJECT["project"]["license"])
    assert citation["preferred-citation"]["url"] == PYPROJECT["project"]["urls"]["Paper"]


def test_pre_commit_and_constraints_name_one_ruff() -> None:
    (rev,) = [repo["rev"] for repo in read_yaml(".pre-commit-config.yaml")["repos"] if "ruff" in repo["repo"]]
    (pin,) = re.findall(r"^ruff==(.+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert rev == f"v{pin}"


def test_changelog_has_an_unreleased_part_and_dated_releases() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    first, *releases = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert first == "[Unreleased]"
    dated = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}", release) for release in releases]
    assert dated and all(dated)
    versions = [Version(match[1]) for match in dated if match]
    assert versions == sorted(versions, reverse=True) and versions[0] <= Version(spo.__version__)
    sections = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed"}


# --- commands ------------------------------------------------------------------------------------------------------


def test_makefile_has_the_checks() -> None:
    assert {"lint", "types", "docs", "test", "slow"} <= targets().keys()
    # A folder is named docs: without .PHONY, make would call that target up to date.
    (phony,) = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert phony.split() == list(targets())
    assert targets()["lint"] == ["ruff check", "ruff format --check"]
    assert "--strict" in targets()["docs"][0]


def test_ci_runs_every_check_before_the_tests() -> None:
    stages = dict(re.findall(r"^stage (\w+) (.+)$", CI, re.MULTILINE))
    assert list(stages)[-6:] == ["lint", "types", "docs", "lowest", "test", "slow"]
    for name in ("lint", "types", "docs", "slow"):
        assert stages[name] == f"make {name}"
    assert "$test_command" in stages["test"]


def test_a_stage_prints_its_time_and_a_failed_one_ends_the_script(tmp_path: Path) -> None:
    (function,) = re.findall(r"^stage\(\) \{\n.*?^\}\n", CI, re.MULTILINE | re.DOTALL)
    script = f"set -euo pipefail\n{function}stage first true\nstage second false\nstage third true\n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"=== first: exit status 0 after \d+ s", done.stdout)
    assert re.search(r"=== second: exit status 1 after \d+ s", done.stdout)
    assert "third" not in done.stdout


def test_the_workflow_runs_the_targets_and_the_lowest_versions() -> None:
    check, lowest = WORKFLOW["jobs"]["check"], WORKFLOW["jobs"]["lowest"]
    assert check["strategy"]["matrix"]["check"] == ["lint", "types", "docs", "test"]
    commands = [step.get("run", "") for step in lowest["steps"]]
    assert any("--resolution lowest-direct" in command for command in commands)
    deselected = re.findall(r"--deselect '?(\S+?)::(\w+)", commands[-1])
    assert deselected
    for file, name in deselected:
        assert f"def {name}(" in (ROOT / file).read_text()


def test_slow_and_nightly_tests_run_only_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    body = "import pytest\ndef test_fast(): pass\n" + "".join(
        f"@pytest.mark.{mark}\ndef test_{mark}(): pass\n" for mark in ("slow", "nightly")
    )
    (tmp_path / "tests" / "test_planted.py").write_text(body)
    for arguments, name in ([], "fast"), (["-m", "slow"], "slow"), (["-m", "nightly"], "nightly"):
        command = [sys.executable, "-m", "pytest", "-n", "0", "-v", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert re.findall(r"::test_(\w+) PASSED", done.stdout) == [name], done.stdout


def test_imperative_docstrings_are_selected_by_their_full_code() -> None:
    lint = PYPROJECT["tool"]["ruff"]["lint"]
    assert "D401" in lint["select"] and "D401" not in lint["ignore"]


# --- what people read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_issue_forms_are_complete(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    identifiers = [field["id"] for field in content["body"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in content["body"])


def test_contributing_wraps_at_100_columns() -> None:
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        long = [line for line in (ROOT / name).read_text().splitlines() if len(line) > 100]
        assert long == [], name


def test_contributing_names_rooms_that_exist() -> None:
    rooms = set(
        re.findall(
            r"`((?:spo|conf|docs|tests|benchmarks|notebooks)/[a-z_/.]*)`", (ROOT / "CONTRIBUTING.md").read_text()
        )
    )
    assert len(rooms) > 20
    assert sorted(room for room in rooms if not (ROOT / room).exists()) == []


def test_imports_go_down_the_layout_of_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    layout = text.partition("## Layout")[2].partition("\n## ")[0]
    items = re.split(r"^\d+\. ", layout, flags=re.MULTILINE)[1:]
    rank = {room: number for number, item in enumerate(items) for room in re.findall(r"`spo/(\w+)", item)}
    edges = {
        (part_of(file), module.split(".")[1])
        for file in FILES
        for module in imported(file)
        if module.startswith("spo.")
    }
    upward = {(room, other) for room, other in edges if room in rank and rank.get(other, len(items)) < rank[room]}
    assert len(items) == 10 and upward == set()


# Openings of a noun clause or a question: such a docstring is not an instruction.
CLAUSES = {"What", "Whether", "Of", "Those", "Who", "Whose", "Which", "How", "Where", "When", "Why"}


def opening_clauses(source: str) -> list[str]:
    """Return the names of functions whose docstring starts with a noun clause."""
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    docstrings = {node.name: ast.get_docstring(node) or "" for node in functions}
    return [name for name, text in docstrings.items() if text.split(maxsplit=1)[:1] and text.split()[0] in CLAUSES]


@pytest.mark.parametrize("folder", ["spo", "tests", "benchmarks", "docs"])
def test_no_docstring_starts_with_a_noun_clause(folder: str) -> None:
    found = {path.name: opening_clauses(path.read_text()) for path in sorted((ROOT / folder).rglob("*.py"))}
    assert {name: names for name, names in found.items() if names} == {}


def test_a_noun_clause_is_found() -> None:
    source = 'def a():\n    """Whether it is."""\ndef b():\n    """Return whether it is."""\ndef c(): ...\n'
    assert opening_clauses(source) == ["a"]
