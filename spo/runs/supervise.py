"""One process per device of a run on this machine: started together, watched, and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from spo import signals
from spo.errors import UserError
from spo.processes import LAUNCHED_BY, place
from spo.runs.claim import write_failure
from spo.signals import Interrupted

SUPERVISOR = "SPO_SUPERVISOR"
"""Environment variable with a file descriptor, which closes when the supervisor ends, and the run directory."""
ADDRESS, PORT, NODE = "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"
"""Environment variables by which the nodes of a run find each other where no launcher of a cluster starts them."""
GRACE_SECONDS = 10
"""Time that the other processes have to end by themselves after one has failed."""
FINISH_SECONDS = 120
"""Time that the other processes have to end after the first one has finished or was interrupted."""
POLL_SECONDS = 0.05


def supervise(words: Sequence[str], count: int, nodes: int, run_dir: Path | None) -> int:
    """Run ``spo WORDS`` in several processes that know each other, and wait for all of them.

    A signal is passed on to all of them. If one fails, the others get a short time to end by themselves and are then
    killed. A process that was killed cannot say so: the reason goes to ``failure.json`` and to the terminal here.

    Args:
        words: Arguments of the command.
        count: Number of processes on this machine.
        nodes: Number of machines, on each of which this command runs.
        run_dir: Directory of the run that gets ``failure.json``; ``None`` for an evaluation of a finished run.

    Returns:
        Exit status of the command.

    Raises:
        Interrupted: A signal came, and the processes were killed.
        UserError: The nodes cannot find each other, or a process was killed.
    """
    variables = _variables(count, nodes)
    first = int(os.environ.get(NODE, "0")) * count if nodes > 1 else 0
    reader, writer = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    interruption: Interrupted | None = None

    def relay(signum: int) -> bool:
        for process in processes:
            with suppress(OSError):  # It has just ended.
                process.send_signal(signum)
        return bool(processes)

    try:
        with signals.relayed(relay):
            for local_rank in range(count):
                own = {SUPERVISOR: f"{reader} {run_dir or ''}", "LOCAL_RANK": str(local_rank)}
                own["RANK"] = str(first + local_rank)
                command = [sys.executable, "-m", "spo", *words]
                # In a session of its own, because a terminal's signal must come through this process alone.
                processes.append(
                    subprocess.Popen(
                        command, env=os.environ | variables | own, pass_fds=[reader], start_new_session=True
                    )
                )
            _wait(processes)
    except Interrupted as raised:
        interruption = raised
    finally:
        ended_before = [process.poll() is not None for process in processes]
        # Processes that still run end themselves. Each reads a byte, and none if this process is killed.
        os.write(writer, bytes(count))
        os.close(writer)
        for process in processes:
            process.wait()
        os.close(reader)
    statuses = [process.returncode for process in processes]
    if interruption is not None:
        if statuses[0] < 0:
            raise interruption
        return statuses[0]
    for rank, status in enumerate(statuses):
        if status < 0 and ended_before[rank]:
            name = signal.Signals(-status).name
            cause = ", for example for lack of memory" if name == "SIGKILL" else ""
            words_of_failure = f"process {first + rank} of {nodes * count} was ended by {name}{cause}"
            if run_dir is not None:
                with suppress(OSError):
                    write_failure(run_dir, words_of_failure)
            raise UserError(f"{words_of_failure}: the same command resumes where it stopped")
    return max(status for status, ended in zip(statuses, ended_before, strict=True) if ended)


def _variables(count: int, nodes: int) -> dict[str, str]:
    """Return the environment variables that the processes share."""
    if nodes > 1 and (missing := [name for name in (ADDRESS, PORT, NODE) if name not in os.environ]):
        raise UserError(
            f"trainer.num_nodes={nodes}: start the command by torchrun or srun, or set {', '.join(missing)} on each of "
            "the nodes"
        )
    return {
        LAUNCHED_BY: "1",
        ADDRESS: os.environ.get(ADDRESS, "127.0.0.1"),
        PORT: os.environ.get(PORT) or str(_free_port()),
        "WORLD_SIZE": str(nodes * count),
        "LOCAL_WORLD_SIZE": str(count),
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all processes have ended, or until one of them has ended long enough before the others."""
    deadline = None
    while None in (statuses := [process.poll() for process in processes]):
        if deadline is None and (statuses[0] is not None or any(statuses)):
            has_failed = any(status and status <= 128 for status in statuses)
            deadline = time.monotonic() + (GRACE_SECONDS if has_failed else FINISH_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def end_with_supervisor() -> None:
    """Let this process end when the supervisor that started it does, even by a signal that cannot be handled.

    The run would otherwise continue unseen and hold its directory. Its last checkpoint is intact.
    """
    # Processes that this one starts do not inherit the file descriptor.
    descriptor, _, run_dir = os.environ.pop(SUPERVISOR).partition(" ")

    def wait() -> None:
        was_killed = not os.read(int(descriptor), 1)
        if was_killed and run_dir and place().is_first and Path(run_dir).is_dir():
            with suppress(OSError):
                write_failure(Path(run_dir), "the command that started the processes of the run was killed")
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
