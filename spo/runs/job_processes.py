"""Processes of a sweep's jobs: a signal to the command that started them is passed on, and it waits for their end."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spo import signals
from spo.records import filenames

# Processes that a launcher has given handlers of its own ignore SIGTERM, so they get the signal of a keyboard.
_BY_LAUNCHER = "launcher"


@contextmanager
def job_processes(sweep_dir: Path) -> Iterator[None]:
    """Pass signals on to the jobs of a sweep that run in other processes of this machine, and wait for their end.

    Jobs in other processes that have not begun do not begin any more. Without such jobs, signals act in this process.

    Args:
        sweep_dir: Sweep directory.

    Raises:
        Interrupted: A signal came.
    """
    here = f"{filenames.PROCESS}.{socket.gethostname()}."
    for left in (sweep_dir / filenames.STOP, *sweep_dir.glob(f"{here}*")):
        left.unlink(missing_ok=True)

    def relay(signum: int) -> bool:
        if not any(sweep_dir.glob(f"{here}*")):
            return False
        (sweep_dir / filenames.STOP).touch()
        # Looked up again: a job that is entered from here on finds the file, and stops by itself.
        for file in sweep_dir.glob(f"{here}*"):
            with suppress(OSError):  # It has just ended.
                os.kill(int(file.name.rpartition(".")[2]), signal.SIGINT if file.read_text() else signum)
        return True

    with signals.relayed(relay):
        yield


def is_stopping(sweep_dir: Path) -> bool:
    """Return whether the command of a sweep was interrupted, so that no further job begins."""
    return (sweep_dir / filenames.STOP).exists()


@contextmanager
def registered(sweep_dir: Path, process: int) -> Iterator[None]:
    """Enter a process as that of a job, while a block lasts.

    Args:
        sweep_dir: Sweep directory.
        process: Id of the process, which may be this one.
    """
    file = sweep_dir / f"{filenames.PROCESS}.{socket.gethostname()}.{process}"
    file.write_text(_BY_LAUNCHER if process == os.getpid() else "")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
