"""Helpers that build environments, copy the project, and run commands in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "conf", "spo")
# A shell inside another project's environment sets these variables.
_DROPPED_VARIABLES = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}


def copy_of_project(folder: Path) -> Path:
    """Copy the files that the package is built from, so that a build does not write into the checkout."""
    folder.mkdir(parents=True)
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(project: Path, folder: Path, *, editable: bool = False) -> Path:
    """Build the wheel that ``pip install [-e] PROJECT`` installs, without an isolated build environment."""
    hook = "build_editable" if editable else "build_wheel"
    code = f"import sys, hatchling.build as backend; print(backend.{hook}(sys.argv[1]))"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / run([sys.executable, "-c", code, str(folder)], project).splitlines()[-1]


def fresh_environment(folder: Path) -> Path:
    """Create an environment with pip only, and return its folder of programs."""
    venv.create(folder, with_pip=True, symlinks=True)
    return programs(folder)


def environment_beside_this_one(folder: Path, wheel: Path) -> Path:
    """Create an environment with the wheel that uses the other packages of the running one, and return its programs.

    Only the folder of the running environment's packages is linked, so that its own (editable) ``spo`` is not found.
    """
    venv.create(folder, symlinks=True)
    python = programs(folder) / "python"
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)], folder)
    site = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    here = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (Path(site) / "beside.pth").write_text("".join(f"{path}\n" for path in here))
    return programs(folder)


def programs(environment: Path) -> Path:
    """Return the folder of an environment's programs."""
    return environment / "bin"


def run(command: Sequence[str], folder: Path, programs: Path | None = None, **variables: str) -> str:
    """Run a command and return its output.

    Args:
        command: Program and arguments.
        folder: Working directory.
        programs: Folder that comes first on the path; by default that of the running Python.
        variables: Further environment variables.

    Raises:
        AssertionError: If the command fails, with its output in the message.
    """
    done = subprocess.run(
        command, cwd=folder, env=_variables(programs, variables), capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, f"{' '.join(command)}\nexit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _variables(programs: Path | None, more: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED_VARIABLES}
    first = programs or Path(sys.executable).parent
    return {**kept, "PATH": f"{first}{os.pathsep}{kept.get('PATH', '')}", **more}
