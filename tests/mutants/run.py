"""The named tests of every mutant, with and without it, in one process; or the fast suite against each mutant."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from omegaconf import OmegaConf

from spo.resources import conf_dir
from spo.stages.verify import PLAN, plan_cases
from spo.stages.verify_case import Case, run_case
from tests.mutants.catalogue import MUTANTS
from tests.mutants.plant import Mutant

TESTS = Path(__file__).parents[1]
VARIABLE = "SPO_MUTANT"
"""Environment variable with the name of the mutant that the plugin plants in every test process."""


@cache
def _plan() -> Any:
    return OmegaConf.load(conf_dir() / PLAN)


@cache
def case_of(row: str) -> Case:
    """Return the first case of ``spo verify`` that a row names."""
    _, member, model, check = row.split(":")
    check, _, kl = check.partition("+")
    cases, _ = plan_cases(_plan(), False, None, [member])
    # Only rows of the optimum come with and without the KL.
    fits = [case for case in cases if (case.model, case.check) == (model, check)]
    return next(case for case in fits if check != "optimum" or bool(case.kl_weight) == bool(kl))


@dataclass
class Runner:
    """A pytest plugin that runs the collected tests as often as mutants name them.

    Attributes:
        mutants: Mutants to run.
        problems: A sentence for each test or row that should have failed or passed.
        killed: Names of the mutants on which everything that they name failed.
    """

    mutants: Sequence[Mutant]
    problems: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run everything without a mutant, and then each mutant's own tests."""
        items: dict[str, list[pytest.Item]] = {}
        for item in session.items:
            # A test without its case in brackets stands for all of its cases.
            for name in (item.nodeid, item.nodeid.partition("[")[0]):
                items.setdefault(name.removeprefix("tests/"), []).append(item)
        with tempfile.TemporaryDirectory(prefix="spo-mutants-") as folder:
            self.folder = Path(folder)
            for name in dict.fromkeys(name for mutant in self.mutants for name in mutant.ids):
                if not self.passes(name, items, None):
                    self.problems.append(f"{name} fails without a mutant")
            for mutant in self.mutants:
                started = perf_counter()
                try:
                    survived = [name for name in mutant.ids if self.passes(name, items, mutant)]
                except LookupError as error:
                    self.problems.append(f"{mutant.name} cannot be run: {error}")
                    continue
                self.problems += [f"{name} passes on {mutant.name}" for name in survived]
                self.killed += [] if survived else [mutant.name]
                verdict = "survives" if survived else "killed"
                capture = session.config.pluginmanager.getplugin("capturemanager")
                with capture.global_and_fixture_disabled():
                    print(f"{verdict:9}{mutant.name} ({perf_counter() - started:.1f} s)", flush=True)
        return True

    def passes(self, name: str, items: dict[str, list[pytest.Item]], mutant: Mutant | None) -> bool:
        """Run a test or a row of ``spo verify``, and return whether it passes."""
        with nullcontext() if mutant is None else mutant.planted():
            if name.startswith("verify:"):
                return self.row_passes(name)
            if name not in items:
                raise LookupError(f"there is no test {name}")
            # Without a next item, fixtures of modules and sessions end too, so none is made by another mutant.
            reports = [report for item in items[name] for report in runtestprotocol(item, log=False, nextitem=None)]
        return not any(report.failed for report in reports)

    def row_passes(self, name: str) -> bool:
        """Run a row of ``spo verify``, and return whether it passes; an error counts as a failure."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            try:
                return run_case(case_of(name), _plan(), Path(folder) / "run", Path(folder) / "cache", None).passed
            except Exception:
                return False


def run_named(mutants: Sequence[Mutant] = MUTANTS) -> Runner:
    """Run what each mutant names, and return the runner with its results."""
    files = {name.partition("[")[0] for mutant in mutants for name in mutant.ids if not name.startswith("verify:")}
    runner = Runner(mutants)
    # Without the options of pyproject.toml, which select and distribute tests, and without pytest's own report.
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:xdist"]
    code = pytest.main([*options, *(str(TESTS / file) for file in sorted(files))], plugins=[runner])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        runner.problems.append(f"pytest ended with the status {int(code)}")
    return runner


def run_all(mutants: Sequence[Mutant]) -> list[str]:
    """Run the fast suite against each mutant until its first failure, and return the names of those that survive."""
    survivors = []
    for mutant in mutants:
        started = perf_counter()
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "tests.mutants.run", str(TESTS)]
        done = subprocess.run(
            command, cwd=TESTS.parent, env=os.environ | {VARIABLE: mutant.name}, capture_output=True, text=True
        )
        verdict = "killed" if done.returncode == pytest.ExitCode.TESTS_FAILED else "survives"
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print(f"{verdict:9}{mutant.name} ({perf_counter() - started:.0f} s) {failed[:1]}", flush=True)
        survivors += [mutant.name] if verdict == "survives" else []
    return survivors


def pytest_configure(config: pytest.Config) -> None:
    """Plant the mutant of the environment for as long as a test process runs."""
    if (name := os.environ.get(VARIABLE)) is not None:
        stack = ExitStack()
        stack.enter_context(next(mutant for mutant in MUTANTS if mutant.name == name).planted())
        config.add_cleanup(stack.close)
