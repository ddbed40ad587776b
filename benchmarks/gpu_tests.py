"""The tests marked ``gpu``, run in a process of their own with each outcome written as it comes.

pytest loads this module as a plugin, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTCOMES_FILE = "SPO_TEST_OUTCOMES"
"""Environment variable with the file to which the plugin appends one JSON object for each test."""


def pytest_runtest_logreport(report: Any) -> None:
    """Append the outcome of a test to the file: of its call, or of a set-up or tear-down that did not pass."""
    if report.when != "call" and report.outcome == "passed":
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""  # of a skip
    crash = getattr(report.longrepr, "reprcrash", None)
    error = f"{crash.path}:{crash.lineno}: {crash.message}" if crash is not None else reason
    line = {"test": report.nodeid, "outcome": report.outcome, "error": error.removeprefix("Skipped: ")[:2000]}
    with open(os.environ[OUTCOMES_FILE], "a") as file:
        file.write(json.dumps(line) + "\n")


def run_gpu_tests(seconds: float, marker: str = "gpu") -> dict[str, Any]:
    """Run the tests with a marker, and return their counts and the failures.

    Args:
        seconds: Seconds after which the tests are stopped. The outcomes until then count.
        marker: Marker of the tests, as pytest knows it.

    Returns:
        ``counts`` of each outcome, ``failures`` with the place and the message of each failed test, ``skips`` with the
        number of tests for each reason, the ``exit_status`` of pytest (``None`` if it was stopped), and the end of its
        output, which has the traces, if it did not succeed.
    """
    files = sorted(str(file) for file in (ROOT / "tests").glob("test_*.py") if f"mark.{marker}" in file.read_text())
    with tempfile.TemporaryDirectory() as name:
        outcomes, log = Path(name) / "outcomes.jsonl", Path(name) / "log.txt"
        command = [sys.executable, "-m", "pytest", "-m", marker, "-n", "0", "-p", "benchmarks.gpu_tests"]
        command += ["--show-capture=no", "--disable-warnings", *files]  # torch.compile logs more than the output keeps
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, OUTCOMES_FILE: str(outcomes)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the commands that tests start are stopped with them
            )
            try:
                status: int | None = process.wait(max(seconds, 0))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        lines = outcomes.read_text().splitlines() if outcomes.exists() else []
        tests = [json.loads(line) for line in lines]
        failed = [test for test in tests if test["outcome"] == "failed"]
        result: dict[str, Any] = {
            "counts": dict(Counter(test["outcome"] for test in tests)),
            "failures": {test["test"]: test["error"] for test in failed},
            "skips": dict(Counter(test["error"] for test in tests if test["outcome"] == "skipped")),
            "exit_status": status,
        }
        if status != 0:
            result["output"] = log.read_text()[-4000:]
    return result
