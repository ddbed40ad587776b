"""The command that starts one process per device: what it tells them, and how they end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spo import signals
from spo.errors import UserError
from spo.runs import supervise as supervising
from spo.runs.claim import read_failure
from spo.runs.supervise import supervise
from spo.signals import Interrupted

INTERPRETER = sys.executable
IMPORTS = "import json, os, pathlib, signal, sys, threading, time; rank = int(os.environ['RANK']); "
# What end_with_supervisor does, without the time that its import takes.
ENDS = (
    "watched = int(os.environ['SPO_SUPERVISOR'].split()[0]); "
    "end = lambda: (os.read(watched, 1), os.kill(os.getpid(), 9)); "
    "threading.Thread(target=end, daemon=True).start(); "
)
READY = "pathlib.Path(f'ready{rank}').write_text(str(os.getpid())); "
HANDLED = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); " + READY + "time.sleep(60)"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + READY + "time.sleep(60)"
# `python -m spo CODE`, of which it runs the code.
PYTHON = """#!/bin/sh
shift 2
exec {python} -c "$@"
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Return a Python that runs the code in place of ``spo``."""
    file = tmp_path / "python"
    file.write_text(PYTHON.format(python=sys.executable))
    file.chmod(0o755)
    return file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a folder where processes run code, and are waited for only shortly."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervising.sys, "executable", str(python))
    monkeypatch.setattr(supervising, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(supervising, "FINISH_SECONDS", 0.6)
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "run").mkdir()
    return tmp_path


def run(code: str, count: int = 2, nodes: int = 1) -> int:
    return supervise([IMPORTS + ENDS + code], count, nodes, Path("run"))


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_ready() -> bool:
    return all((file := Path(f"ready{rank}")).exists() and file.read_text() for rank in range(2))


def pids() -> list[int]:
    return [int(Path(f"ready{rank}").read_text()) for rank in range(2)]


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def when_ready() -> Callable[[int], threading.Thread]:
    """Return a function that sends this process a signal as soon as its processes are ready."""

    def send(signum: int) -> threading.Thread:
        def target() -> None:
            wait_for(is_ready)
            os.kill(os.getpid(), signum)

        thread = threading.Thread(target=target)
        thread.start()
        return thread

    return send


def test_processes_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SPO_LAUNCHED"]
    code = f"pathlib.Path(f'env{{rank}}').write_text(json.dumps([os.environ[name] for name in {names}]))"
    assert run(code) == 0
    first, second = (json.loads(Path(f"env{rank}").read_text()) for rank in range(2))
    assert first == ["0", "2", "0", "2", "127.0.0.1", first[5], "1"] and int(first[5]) > 0
    assert second == ["1", "2", "1", "2", *first[4:]]
    for name, value in {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run(code, nodes=2) == 0
    assert json.loads(Path("env3").read_text()) == ["3", "4", "1", "2", "10.0.0.1", "29500", "1"]
    assert run(code) == 0 and not Path("env4").exists()  # The number of the node does not matter to one node.


def test_nodes_must_find_each_other() -> None:
    with pytest.raises(UserError, match=r"trainer.num_nodes=2: .* set MASTER_ADDR, MASTER_PORT, NODE_RANK on each"):
        run("sys.exit(0)", nodes=2)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(rank)", 1),
        ("sys.exit(3 if rank == 0 else 1)", 3),
        # One that hangs is killed, and its status is not that of the run.
        ("time.sleep(0 if rank == 1 else 60); sys.exit(1)", 1),
        ("time.sleep(0 if rank == 0 else 60); sys.exit(0)", 0),
    ],
)
def test_the_status_is_that_of_the_processes_that_ended_by_themselves(code: str, status: int) -> None:
    begun = time.monotonic()
    assert run(code) == status
    assert time.monotonic() - begun < 20
    assert read_failure(Path("run")) is None


def test_a_first_process_that_is_slower_than_the_others_is_not_killed() -> None:
    assert run("time.sleep(1.5 if rank == 0 else 0); pathlib.Path(f'end{rank}').touch()") == 0
    assert Path("end0").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_was_killed_is_named(rank: int) -> None:
    with pytest.raises(UserError, match=f"process {rank} of 2 was ended by SIGKILL, for example for lack of memory"):
        run(f"os.kill(os.getpid(), signal.SIGKILL) if rank == {rank} else time.sleep(60)")
    failure = read_failure(Path("run"))
    assert failure is not None and failure["kind"] == "failed"
    assert failure["error"] == f"process {rank} of 2 was ended by SIGKILL, for example for lack of memory"


def test_a_process_that_is_ended_after_another_failed_does_not_write_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = "from spo.runs.supervise import end_with_supervisor; end_with_supervisor(); "
    waits = "while not pathlib.Path('ready0').exists(): time.sleep(0.02)"
    code = IMPORTS + f"exec({ends + READY + 'time.sleep(60)'!r} if rank == 0 else {waits!r}); sys.exit(1)"
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    assert supervise([code], 2, 1, Path("run").absolute()) == 1
    assert read_failure(Path("run")) is None  # The process that failed writes its own reason.


def test_a_crash_is_named_by_its_signal() -> None:
    with pytest.raises(UserError, match=r"process 1 of 2 was ended by SIGSEGV: the same command"):
        run("os.kill(os.getpid(), signal.SIGSEGV) if rank == 1 else sys.exit(1)")


def test_a_signal_reaches_all_processes(when_ready: Callable[[int], threading.Thread]) -> None:
    thread = when_ready(signal.SIGTERM)
    with signals.handled():
        assert run(HANDLED) == 143
    thread.join()
    assert not any(map(is_alive, pids()))
    assert read_failure(Path("run")) is None  # The first process writes why it was interrupted.


def test_processes_that_ignore_a_signal_live_until_one_ends(when_ready: Callable[[int], threading.Thread]) -> None:
    thread = when_ready(signal.SIGTERM)
    with signals.handled():
        assert run(f"exec({HANDLED!r} if rank == 0 else {DEAF!r})") == 143
    thread.join()
    assert not any(map(is_alive, pids()))


def test_a_signal_before_processes_handle_it_interrupts(when_ready: Callable[[int], threading.Thread]) -> None:
    thread = when_ready(signal.SIGTERM)
    with signals.handled(), pytest.raises(Interrupted, match="interrupted by SIGTERM"):
        run(READY + "time.sleep(60)")
    thread.join()
    assert not any(map(is_alive, pids()))


def test_processes_end_with_the_command_that_started_them(python: Path) -> None:
    words = "from spo.runs.supervise import end_with_supervisor; end_with_supervisor(); "
    code = (
        f"import sys; from pathlib import Path; sys.executable = {str(python)!r}; "
        "from spo.runs.supervise import supervise; "
        f"supervise([{IMPORTS + words + READY + 'time.sleep(60)'!r}], 2, 1, Path('run').absolute())"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = subprocess.Popen([INTERPRETER, "-c", code], env=environment)
    wait_for(is_ready, 120)
    command.kill()
    command.wait()
    wait_for(lambda: not any(map(is_alive, pids())))
    failure = read_failure(Path("run"))
    assert failure is not None and failure["error"] == "the command that started the processes of the run was killed"
