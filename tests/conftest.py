"""Fixtures and hooks of all tests: cached models and compositions, the order of files, and allowed skips."""

from __future__ import annotations

import copy
import os
import signal
import sys
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # Tests run in parallel.
# A shell starts background jobs with an ignored SIGINT, and nohup with an ignored SIGHUP. Tests raise both.
for name in ("SIGINT", "SIGHUP"):
    if (signum := getattr(signal, name, None)) is not None and signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


# The slowest files, which start first so that neither worker waits for the other at the end.
LONGEST = (
    "test_contract.py",
    "test_end_to_end.py",
    "test_config.py",
    "test_wandb.py",
    "test_install.py",
    "test_controllers.py",
    "test_cli.py",
    "test_benchmarks.py",
    "test_docs.py",
    "test_sweeps.py",
    "test_real_data.py",
)
MAX_COMPOSITIONS = 32
"""Largest number of configurations in memory, of about a megabyte each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest files first."""
    place = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def compose_once() -> Iterator[None]:
    """Remember what Hydra composes: most tests start from the same few compositions of the shipped configuration."""
    if "hydra" not in sys.modules:
        yield
        return
    hydra = sys.modules["hydra"]
    original = hydra.compose

    @lru_cache(maxsize=MAX_COMPOSITIONS)
    def composed(folders: tuple[str, ...], name: str, overrides: tuple[str, ...], own_node: bool) -> Any:
        return original(name, list(overrides), return_hydra_config=own_node)

    def compose(name: str, overrides: list[str], return_hydra_config: bool = False) -> Any:
        """Compose as Hydra does, from memory if all members are in the repository; others may change between calls."""
        loader = hydra.core.global_hydra.GlobalHydra.instance().config_loader()
        folders = [element.path for element in loader.get_search_path().get_path()]
        files = [folder.removeprefix("file://") for folder in folders if folder.startswith("file://")]
        shipped = all(Path(file).is_relative_to(ROOT) for file in files)
        if not shipped or any("hydra.searchpath" in override for override in overrides):
            return original(name, overrides, return_hydra_config=return_hydra_config)
        cfg = copy.deepcopy(composed(tuple(folders), name, tuple(overrides), return_hydra_config))
        if return_hydra_config:
            cfg.hydra.runtime.cwd = os.getcwd()
        return cfg

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hydra, "compose", compose)
        yield


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache for commands, so that the reference model of ``+debug=tiny`` is built once in a session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared cache"
    folder.mkdir(exist_ok=True)
    return folder


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Fail the run if a test was skipped for a reason that the project does not list."""
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["spo"]["tests"]["skip_reasons"]
    reasons = {_reason(report) for report in terminalreporter.stats.get("skipped", [])}
    unknown = sorted(reason for reason in reasons if reason not in allowed)
    if unknown:
        terminalreporter.section("skips that are not allowed")
        terminalreporter.line("\n".join(unknown))
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _reason(report: Any) -> str:
    """Return the reason of a skipped test."""
    longrepr = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return longrepr.removeprefix("Skipped: ")
