"""What all tests share: where made models are kept, and which skips are allowed."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for commands that are run, so that the reference model of ``+debug=tiny`` is made once."""
    return tmp_path_factory.mktemp("cache")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Fails the run on a skip whose reason is not on the project's list."""
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["spo"]["tests"]["skip_reasons"]
    reasons = {_reason(report) for report in terminalreporter.stats.get("skipped", [])}
    unknown = sorted(reason for reason in reasons if reason not in allowed)
    if unknown:
        terminalreporter.section("skips that are not allowed")
        terminalreporter.line("\n".join(unknown))
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _reason(report: Any) -> str:
    longrepr = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return longrepr.removeprefix("Skipped: ")
