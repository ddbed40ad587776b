"""The package as installed: what the wheel holds, that it runs from any folder, and that what it needs is declared."""

from __future__ import annotations

import ast
import json
import re
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import spo
from tests.environments import (
    CONSTRAINTS,
    ROOT,
    build_wheel,
    copy_of_project,
    environment_beside_this_one,
    fresh_environment,
    run,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# A loss outside the package, and its yaml.
OWN_LOSS = """
from spo.losses import PreferenceLoss


class MyLoss(PreferenceLoss):
    def __init__(self, margin):
        self.margin = margin

    def of_pairs(self, pair, *, alpha, beta):
        chosen = pair.policy_chosen - pair.reference_chosen
        rejected = pair.policy_rejected - pair.reference_rejected
        return (self.margin - beta * (chosen - rejected)).clamp(min=0)
"""
OWN_METHOD = """
name: mine
title: My own loss
paper: ""
default_beta: 0.3
loss:
  _target_: mypkg.MyLoss
  margin: 1.5
"""


# --- the wheel -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_of_project(folder / "project"), folder / "dist")


def test_wheel_holds_what_a_run_needs_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"spo/{file.relative_to(ROOT / 'spo')}" for file in (ROOT / "spo").rglob("*.*") if file.suffix != ".pyc"}
    wanted |= {f"spo/{file.relative_to(ROOT)}" for file in (ROOT / "conf").rglob("*.yaml")}
    assert {"spo/conf/train.yaml", "spo/py.typed", "spo/pages/templates/report.html.j2"} < wanted
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert {name.rpartition("/")[2] for name in names - wanted} >= {"METADATA", "LICENSE", "entry_points.txt"}


def test_description_of_the_wheel_has_no_link_into_the_repository(wheel: Path) -> None:
    """A package index shows the README without the files that it links to."""
    (metadata,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert len(targets) > 10 and all(target.startswith("https://") for target in targets)
    assert "docs/" not in "".join(targets) and "pip install" in text


def test_source_archive_holds_what_the_commands_of_the_readme_need(tmp_path: Path) -> None:
    tracked = run(["git", "ls-files"], ROOT).split()
    code = "import sys, hatchling.build as backend; print(backend.build_sdist(sys.argv[1]))"
    archive = tmp_path / run([sys.executable, "-c", code, str(tmp_path)], ROOT).splitlines()[-1]
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {name for name in tracked if (ROOT / name).exists()} <= names


def test_version_of_the_wheel_comes_from_the_package(wheel: Path) -> None:
    (metadata,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert f"\nVersion: {spo.__version__}\n" in text
    assert "version" not in PROJECT


# --- installed -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of an environment that has the wheel."""
    return environment_beside_this_one(tmp_path_factory.mktemp("wheel") / "environment", wheel)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(
    request: pytest.FixtureRequest, with_wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Return the programs of an environment that has the package, and the folder that its code is to come from."""
    if request.param == "wheel":
        return with_wheel, with_wheel.parent
    folder = tmp_path_factory.mktemp("editable")
    project = copy_of_project(folder / "project")
    built = build_wheel(project, folder / "dist", editable=True)
    return environment_beside_this_one(folder / "environment", built), project


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def write_own_method(folder: Path) -> None:
    (folder / "mypkg.py").write_text(OWN_LOSS)
    (folder / "my_conf" / "method").mkdir(parents=True)
    (folder / "my_conf" / "method" / "mine.yaml").write_text(OWN_METHOD)


def test_runs_from_an_empty_folder(installed: tuple[Path, Path], empty: Path) -> None:
    programs, home = installed
    where = "import spo, spo.resources as c; print(spo.__file__); print(c.conf_dir())"
    for path in run(["python", "-c", where], empty, programs).split():
        assert Path(path).is_relative_to(home.resolve())
    assert "spo_weighted" in run(["spo", "--help"], empty, programs)
    assert yaml.safe_load(run(["spo", "train", "--cfg", "job"], empty, programs))["method"]["name"] == "spo"
    assert run(["spo", "--version"], empty, programs) == run(["python", "-m", "spo", "--version"], empty, programs)
    assert list(empty.iterdir()) == []


def test_finds_a_method_of_ones_own(installed: tuple[Path, Path], empty: Path) -> None:
    programs, _ = installed
    write_own_method(empty)
    chosen = ["--config-dir", "my_conf", "method=mine"]
    cfg = yaml.safe_load(run(["spo", "train", *chosen, "beta=0.2", "--cfg", "job"], empty, programs))
    assert cfg["method"]["loss"] == {"_target_": "mypkg.MyLoss", "margin": 1.5}
    assert "mine" in run(["spo", "train", "--help", *chosen[:2]], empty, programs)


def test_a_loss_of_ones_own_trains(with_wheel: Path, empty: Path, cache_dir: Path) -> None:
    write_own_method(empty)
    command = ["spo", "train", "--config-dir", "my_conf", "method=mine", "hydra.run.dir=mine", "+debug=tiny"]
    run(command, empty, with_wheel, SPO_CACHE_DIR=str(cache_dir))
    history = [json.loads(line) for line in (empty / "mine" / "history.jsonl").read_text().splitlines()]
    losses = [row["train/loss/preference"] for row in history if "train/loss/preference" in row]
    # while policy and reference are one, every pair's loss is the margin
    assert losses[0] == pytest.approx(1.5, abs=0.2) and losses[-1] != losses[0]
    assert "eval/win_rate" in json.loads((empty / "mine" / "metrics.json").read_text())


@pytest.mark.slow
def test_wheel_with_its_dependencies(wheel: Path, tmp_path: Path, empty: Path) -> None:
    programs = fresh_environment(tmp_path / "environment")
    run(["python", "-m", "pip", "install", "-q", str(wheel), "-c", str(CONSTRAINTS)], empty, programs)
    run(["python", "-m", "pip", "check"], empty, programs)
    run(["spo", "train", "+debug=tiny", "hydra.run.dir=first"], empty, programs)
    assert (empty / "first" / "report.html").stat().st_size > 10_000
    assert (empty / "first" / "policy" / "model.safetensors").is_file()


@pytest.mark.nightly
def test_fast_tests_with_the_lowest_versions(tmp_path: Path) -> None:
    """As the workflow does it, in an environment with the lowest versions that pyproject.toml declares."""
    programs = fresh_environment(tmp_path / "environment")
    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    run(["python", "-m", "pip", "install", "-q", "uv"], tmp_path, programs)
    lowest = ["uv", "pip", "install", "-q", "--python", str(programs / "python"), "--resolution", "lowest-direct"]
    run([*lowest, "-e", f"{ROOT}[test]", torch], tmp_path, programs)
    skipped = ["--deselect", "tests/test_install.py::test_constraints_pin_all_that_is_installed"]
    run(["python", "-m", "pytest", *skipped], ROOT, programs)


# --- what is declared ----------------------------------------------------------------------------------------------


def names_of(requirements: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def imported(folder: Path) -> set[str]:
    """Distributions that the files of a folder import from."""
    modules: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
                modules.add(node.module.partition(".")[0])
    outside = modules - set(sys.stdlib_module_names) - {"spo", "tests", "benchmarks", "docs", "examples"}
    known = packages_distributions()
    return {canonicalize_name(known[module][0]) if module in known else module for module in outside}


def test_what_is_imported_is_declared() -> None:
    base = names_of(PROJECT["dependencies"])
    optional = ("peft", "deepspeed", "tensorboard", "joblib", "slurm", "optuna", "judge", "dashboards")
    used_where_installed = {"pandas"}  # `load_runs` returns a list of dictionaries without it
    declared = base | names_of(one for extra in optional for one in EXTRAS[extra])
    assert imported(ROOT / "spo") <= declared | used_where_installed
    of_tests = (*optional, "test", "trl", "notebooks")
    assert imported(ROOT / "tests") <= base | names_of(one for extra in of_tests for one in EXTRAS[extra])


def test_what_is_declared_is_used() -> None:
    text = "\n".join(file.read_text() for file in (ROOT / "conf").rglob("*.yaml"))
    targets = {match.partition(".")[0] for match in re.findall(r"_target_: (\S+)", text)}
    assert names_of(PROJECT["dependencies"]) <= imported(ROOT / "spo") | targets


def needed(requirements: Iterable[str], extras: frozenset[str] = frozenset()) -> Iterator[str]:
    """Names of everything that the requirements lead to in this environment."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(text), extras) for text in requirements]
    while waiting:
        requirement, within = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in within | {""}):
            continue
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        yield name
        try:
            waiting += [(Requirement(text), key[1]) for text in requires(name) or []]
        except PackageNotFoundError:
            continue


def test_constraints_pin_all_that_is_installed() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.!]*", line) for line in lines)
    pinned = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    assert len(pinned) == len(lines)
    assert pinned["torch"] == "2.13.0"
    # Torch itself names the exact versions of what it needs for an accelerator.
    accelerator = ("nvidia-", "cuda-", "triton")
    wanted = set(needed(["spo[dev]"])) - {"spo"}
    assert {name for name in wanted if not name.startswith(accelerator)} <= pinned.keys()
    for text in [
        *PROJECT["dependencies"],
        *(one for extra in EXTRAS.values() for one in extra),
    ]:
        requirement = Requirement(text)
        if requirement.name != "spo":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text
    assert version("torch").partition("+")[0] == pinned["torch"]
