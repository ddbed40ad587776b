"""All that is to be learned on one GPU in one call of under nine minutes, most valuable first.

Usage: ``python -m benchmarks.gpu --json FILE [--minutes 8.5] [--device gpu|cpu] [--size 1b-bf16] [--pairs 16]
[--rounds 3] [--steps 10] [--only STAGE ...]``

- ``tests``: the tests marked ``gpu``.
- ``steps``: optimizer steps of DPO and SPO here and of TRL's DPO, in alternating rounds of one process: seconds, real
  tokens per second, utilization of the measured rate of matrix products, and peak memory.
- ``sampler``: the static sampler against ``generate``.
- ``attention``: packed attention forward and backward against padded SDPA: values, gradients and time.
- ``compile``: DPO steps with ``speed.compile`` on and off.

Pairs are random tokens with the lengths of HH pairs (``hh_lengths.json``), so nothing outside the repository is needed.
The result file is rewritten whenever a number is there. It holds for each stage its status (``pending``, ``running``,
``done``, ``failed`` or ``skipped``), its error message, and its result, which may be partial. All stages but the tests
run in a second process, which loads its libraries and its model during the tests. A stage that fails or takes too long
ends that process, and the next stage gets a new one: an error of CUDA makes a process useless.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from benchmarks.common import show, write_json
from benchmarks.gpu_tests import run_gpu_tests

BUDGETS_S = {"tests": 150.0, "steps": 210.0, "sampler": 60.0, "attention": 60.0, "compile": 90.0}
"""Seconds that each stage may take, in the order of the stages."""
GRACE_S = 15.0
"""Seconds that a stage has after its budget to end by itself."""
STOP_S = 2.0
"""Seconds that an idle process has to end by itself before it is killed."""
LEAST_S = 5.0
"""A stage is skipped if fewer seconds than this are left of the whole time."""
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """What the stages measure.

    Attributes:
        device: ``"gpu"`` or ``"cpu"``.
        size: Size of the model, a key of ``benchmarks.workloads.SIZES``.
        pairs: Preference pairs of an optimizer step.
        rounds: Most rounds of each comparison.
        steps: Steps of a contestant in a round, the ones that warm up included.
    """

    device: str
    size: str
    pairs: int
    rounds: int
    steps: int


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the stages that the command line asks for.

    Returns:
        The result that ``--json`` writes.
    """
    started = monotonic()
    asked = _parser().parse_args(arguments)
    on_gpu = asked.device == "gpu"
    settings = Settings(
        asked.device,
        asked.size or ("1b-bf16" if on_gpu else "toy"),
        asked.pairs or (16 if on_gpu else 4),
        asked.rounds or (3 if on_gpu else 1),
        asked.steps or (10 if on_gpu else 4),
    )
    result = run_stages(asked.only, settings, started + 60 * asked.minutes, asked.json)
    rows = [
        (name, entry["status"], entry.get("seconds", 0.0), entry.get("error", ""))
        for name, entry in result["stages"].items()
    ]
    title = f"{settings.size}, {settings.pairs} pairs per step: {asked.json}"
    show(title, ["stage", "status", "seconds", "error"], rows)
    return result


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", required=True, help="file for the result")
    parser.add_argument("--minutes", type=float, default=8.5, help="whole time (default: %(default)s)")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu", help="cpu: a rehearsal of the stages")
    parser.add_argument("--size", help="size of the model (default: 1b-bf16, on a CPU toy)")
    parser.add_argument("--pairs", type=int, help="pairs of an optimizer step (default: 16, on a CPU 4)")
    parser.add_argument("--rounds", type=int, help="most rounds of a comparison (default: 3, on a CPU 1)")
    parser.add_argument("--steps", type=int, help="steps of a contestant in a round (default: 10, on a CPU 4)")
    stages = {"nargs": "+", "choices": list(BUDGETS_S), "default": list(BUDGETS_S), "metavar": "STAGE"}
    parser.add_argument("--only", **stages, help=f"stages to run: {', '.join(BUDGETS_S)}")  # type: ignore[arg-type]
    return parser


def run_stages(
    names: Sequence[str],
    settings: Settings,
    deadline: float,
    path: str | None,
    serve: Callable[[Connection, Settings], None] | None = None,
) -> dict[str, Any]:
    """Run stages one after the other, and rewrite the result file whenever something is new.

    Args:
        names: Stages to run.
        settings: Settings of the stages.
        deadline: Time of ``time.monotonic`` at which everything ends.
        path: Result file, or ``None``.
        serve: Function that runs stages in the second process; by default :func:`_serve`.

    Returns:
        The result.
    """
    result: dict[str, Any] = {"settings": vars(settings), "stages": {name: {"status": "pending"} for name in names}}
    worker = Worker(serve or _serve, settings)

    def update(name: str, found: dict[str, Any]) -> None:
        result["stages"][name].update(found)
        write_json(path, result)

    try:
        for name in names:
            left = deadline - monotonic()
            if left < LEAST_S:
                update(name, {"status": "skipped", "error": f"out of time: {max(left, 0):.1f} s were left"})
                continue
            if name == "tests" and settings.device == "cpu":
                update(name, {"status": "skipped", "error": "no accelerator"})
                continue
            update(name, {"status": "running"})
            worker.start()
            started, budget = monotonic(), min(BUDGETS_S[name], max(left - GRACE_S, left / 2))
            if name == "tests":
                outcome = tests(budget)
            else:
                outcome = worker.run(name, budget, min(budget + GRACE_S, left), partial(update, name))
            result["environment"] = worker.environment
            update(name, {**outcome, "seconds": monotonic() - started})
    finally:
        worker.stop()
    write_json(path, result)
    return result


def tests(seconds: float) -> dict[str, Any]:
    """Run the tests marked ``gpu`` for some seconds at most, and return their entries in the result file."""
    found = run_gpu_tests(seconds)
    errors = []
    if found["exit_status"] is None:
        errors.append(f"stopped after {seconds:.0f} s")
    if found["failures"]:
        errors.append(f"{len(found['failures'])} tests failed")
    if not found["counts"]:
        errors.append("no test ran")
    if errors or found["exit_status"] != 0:
        errors = errors or [f"pytest ended with status {found['exit_status']}"]
        return {"status": "failed", "error": ", ".join(errors), "result": found}
    if found["counts"].keys() == {"skipped"}:
        return {"status": "skipped", "error": ", ".join(found["skips"]), "result": found}
    return {"status": "done", "result": found}


class Worker:
    """A process that runs stages one after the other.

    Args:
        serve: Function that the process calls with its end of a connection and the settings. It sends
            ``("environment", {...})`` once, then receives ``(stage, seconds)`` and sends any number of
            ``("partial", result)`` and one ``("done", result)`` or ``("failed", error)`` for each.
        settings: Settings of the stages.

    Attributes:
        environment: Versions and hardware as the process reported them, or ``None``.
    """

    def __init__(self, serve: Callable[[Connection, Settings], None], settings: Settings) -> None:
        self._serve, self._settings = serve, settings
        self._process: Any = None
        self._connection: Any = None
        self.environment: dict[str, Any] | None = None

    def start(self) -> None:
        """Start the process if it does not run; it gets ready while others work."""
        if self._process is not None:
            return
        # A forked process could not use CUDA if a library has touched it here, so the process starts afresh.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs, self._settings))
        self._process.start()
        theirs.close()

    def run(self, stage: str, budget: float, limit: float, report: Report) -> dict[str, Any]:
        """Run a stage and return its entries in the result file.

        Args:
            stage: Name of the stage.
            budget: Seconds after which the stage begins nothing new.
            limit: Seconds after which the process is stopped.
            report: Function that is given the entries of each partial result.
        """
        started = monotonic()
        self.start()
        try:
            self._connection.send((stage, budget))
            while self._connection.poll(max(started + limit - monotonic(), 0)):
                kind, value = self._connection.recv()
                if kind == "environment":
                    self.environment = value
                elif kind == "partial":
                    report({"result": value})
                elif kind == "done":
                    return {"status": "done", "result": value}
                else:
                    self.stop()
                    return {"status": "failed", "error": value}
            error = f"stopped after {limit:.0f} s"
        except (EOFError, ConnectionError):
            self._process.join(STOP_S)
            error = f"its process ended with status {self._process.exitcode}"
        self.stop()
        return {"status": "failed", "error": error}

    def stop(self) -> None:
        """Stop the process and those that it started."""
        if self._process is None:
            return
        self._connection.close()  # an idle process ends by itself when nothing more can come
        self._process.join(STOP_S)
        with suppress(ProcessLookupError):  # the process has no group of its own yet, or has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._process = None


def _serve(connection: Connection, settings: Settings) -> None:
    os.setsid()  # the processes that torch.compile starts belong to the group and end with it
    from benchmarks.gpu_stages import serve  # loads torch and transformers, which the supervisor does without

    serve(connection, settings)


if __name__ == "__main__":
    stages = main()["stages"]
    sys.exit(any(entry["status"] == "failed" for entry in stages.values()))
