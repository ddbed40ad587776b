"""Imports run one way, and the command line starts without the heavy ones."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spo
from spo.config.compose import compose
from spo.runs.claim import claim
from tests.comparison_runs import write_sweep
from tests.iterations import make_iteration

ROOT = Path(spo.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Each part of the package may import from the layers below its own, and from itself.
LAYERS = [
    {"slurm"},
    {"processes"},
    {"_old_names", "bounds", "errors", "logs", "notes", "secrets", "signals", "wording"},
    {"types", "resources", "seeds", "stats", "batching", "records"},
    {"ops", "random_state"},
    {"forward"},
    {"losses", "schedules"},
    {"data", "models", "sampling", "metrics"},
    {"objective"},
    {"regularizers", "watch"},
    {"guard"},
    {"module", "evaluation"},
    {"rounds"},
    {"callbacks", "exact"},
    {"comparison"},
    {"pages"},
    {"tracking", "config"},
    {"runs"},
    {"stages"},
    {"help", "api"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
WITHIN_A_LAYER = {
    ("models", "data"),  # the built-in model learns its tokenizer from the built-in stories
}
HEAVY = ("torch", "lightning", "transformers", "wandb", "datasets", "hydra", "omegaconf", "numpy", "rich")


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """Return modules that a file imports, at the top or inside functions, except those for type checkers."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            module = str(node.module)
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "spo" else {module}
    return found


def test_every_part_has_a_layer() -> None:
    assert {part_of(file) for file in FILES} == set(LEVEL)


def test_contributing_lists_every_part_above_what_it_imports() -> None:
    text = (ROOT.parent / "CONTRIBUTING.md").read_text().partition("## Layout")[2].partition("\n## ")[0]
    items = re.split(r"^\d+\. ", text, flags=re.MULTILINE)[1:]
    line = {part: place for place, item in enumerate(items, 1) for part in re.findall(r"`spo/(\w+)(?:/|\.py)`", item)}
    assert set(line) == set(LEVEL) - {"__init__", "__main__", "_old_names"}
    for file in FILES:
        others = {module.split(".")[1] for module in imported(file) if module.startswith("spo.")}
        for other in others & line.keys():
            assert line.get(part_of(file), 0) <= line[other], f"{file} imports {other}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_go_down(file: Path) -> None:
    part = part_of(file)
    for module in imported(file):
        if not module.startswith("spo."):
            continue
        other = module.split(".")[1]
        if other == "__version__" or other == part or (part, other) in WITHIN_A_LAYER:
            continue
        assert LEVEL[other] < LEVEL[part], f"{part} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_rooms_import_only_allowed_packages(file: Path) -> None:
    outside = {module.partition(".")[0] for module in imported(file)} - {"spo"} - set(sys.stdlib_module_names)
    if part_of(file) in ("types", "ops", "losses", "regularizers", "schedules"):
        assert outside <= {"annotated_types", "torch"}
    if part_of(file) == "records":
        assert not outside & {"torch", "hydra", "omegaconf"}
    if part_of(file) != "tracking":
        assert not outside & {"wandb", "wandb_workspaces"}


def test_layers_have_no_cycle() -> None:
    edges = {
        (part_of(file), module.split(".")[1])
        for file in FILES
        for module in imported(file)
        if module.startswith("spo.") and module.split(".")[1] in LEVEL and module.split(".")[1] != part_of(file)
    }
    assert not {(a, b) for a, b in edges if (b, a) in edges}


LIBRARIES = ("datasets", "lightning", "tokenizers", "torch", "torchmetrics", "transformers", "wandb")


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        ("--help", {*HEAVY}),
        ("train --help", {*HEAVY}),
        ("train --cfg job", {*LIBRARIES, "jinja2", "numpy", "pydantic"}),
        ("train --cfg job -m method=spo,dpo beta=0.1,0.3", {*LIBRARIES, "jinja2", "numpy", "pydantic"}),
        ("compare sweep", {*LIBRARIES, "hydra", "omegaconf"}),
        ("report sweep/method-dpo_beta-0.1_seed-1", {*LIBRARIES, "hydra", "numpy", "rich"}),
        ("dashboard entity/project", {"hydra", "lightning", "torch", "transformers"}),  # refused: there is no key
        ("report nowhere", {*LIBRARIES, "hydra", "numpy", "rich"}),
        ("report iteration", {*LIBRARIES, "hydra", "numpy", "rich"}),
    ],
)
def test_command_imports_only_what_it_uses(words: str, unused: set[str], tmp_path: Path) -> None:
    if "sweep" in words:
        write_sweep(tmp_path / "sweep", seeds=(1, 2))
    if "iteration" in words:
        make_iteration(tmp_path / "iteration")
    status, modules, errors = run_and_list_modules(words, tmp_path)
    assert status == ("dashboard" in words or "nowhere" in words), errors
    assert not unused & modules


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("method=spoo", "method=spoo: no such member of method; did you mean spo?"),
        ("alpha=foo", "alpha=foo: no such member of alpha; the group has constant"),
        ("data=jsonl", "data.path is not set: the file, folder or hub name of your preference pairs"),
        ("experiment=nowhere", "experiment=nowhere: no such member of experiment"),
        ("trainer.max_steps=-1 data.batch_size=none", "data.batch_size=none: must be a whole number"),
        ("-m method=spo,dop seed=1,2", "method=dop: no such member of method; did you mean dpo?"),
        ("hydra.run.dir=used seed=5", "seed: 0 there, 5 now"),
        ("hydra.run.dir=used method=dpo beta=3", "beta.value: 0.1 there, 3 now"),
    ],
)
def test_wrong_command_is_answered_without_importing_torch(words: str, message: str, tmp_path: Path) -> None:
    if "used" in words:
        with claim(tmp_path / "used", compose([], run_dir=tmp_path / "used")):
            pass
    status, modules, errors = run_and_list_modules(f"train {words}", tmp_path)
    assert status == 1 and message in errors and "Traceback" not in errors
    assert not {*LIBRARIES, "numpy", "pydantic", "rich", "pyarrow"} & modules


def run_and_list_modules(words: str, folder: Path) -> tuple[int, set[str], str]:
    """Run a command in a process of its own; return its status, the modules it imported, and its stderr."""
    code = "import sys, spo.cli; status = spo.cli.main(sys.argv[1:]); print(status, *sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent), "NETRC": os.devnull}
    environment.pop("WANDB_API_KEY", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=environment,
    )
    status, *modules = done.stdout.splitlines()[-1].split()
    assert "spo.cli" in modules
    return int(status), set(modules), done.stderr
