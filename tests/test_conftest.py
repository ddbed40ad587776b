"""A skip for a reason that the project does not allow is a failure."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments import ROOT


@pytest.mark.parametrize(
    ("body", "status", "workers"),
    [
        ("import pytest\ndef test_it():\n    pytest.skip('no SPO_DATA_DIR')\n", 0, 2),
        ("import pytest\ndef test_it():\n    pytest.skip('not today')\n", 1, 2),
        ("import pytest\n@pytest.mark.skip(reason='not today')\ndef test_it(): pass\n", 1, 0),
        ("import pytest\npytest.importorskip('nonesuch', reason='not today')\n", 1, 0),
    ],
)
def test_skip_without_an_allowed_reason_fails_the_run(body: str, status: int, workers: int, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_planted.py").write_text(body)
    (tmp_path / "tests" / "test_passes.py").write_text("def test_it(): pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", str(workers)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status, done.stdout
    assert ("skips that are not allowed" in done.stdout) == bool(status)
    assert "no SPO_DATA_DIR" in done.stdout if status == 0 else "not today" in done.stdout
