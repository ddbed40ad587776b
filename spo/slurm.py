"""The SLURM job that runs a command: its id, where its processes meet, and its requeue after a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import zlib

REQUEUING = ("SIGUSR1", "SIGTERM")
"""Names of the signals that SLURM sends before it ends a job."""
_FIRST_PORT, _NUM_PORTS = 15_000, 10_000
_INTERACTIVE = ("bash", "interactive")


def job_id() -> str | None:
    """Return the id of the SLURM job of this process, as ``scontrol`` reads it; ``None`` without a batch job.

    A shell of SLURM is not a batch job: a person types several commands in it.
    """
    variables = os.environ
    if "SLURM_JOB_ID" not in variables or variables.get("SLURM_JOB_NAME") in _INTERACTIVE:
        return None
    array = variables.get("SLURM_ARRAY_JOB_ID")
    return variables["SLURM_JOB_ID"] if array is None else f"{array}_{variables['SLURM_ARRAY_TASK_ID']}"


def meeting_point() -> tuple[str, int]:
    """Return the first node of this step of a job, and a port that all processes of the step compute alike."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "127.0.0.1"
    # Several jobs, or several steps of one job, may share a node.
    step = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"
    port = _FIRST_PORT + zlib.crc32(step.encode()) % _NUM_PORTS
    return SLURMEnvironment.resolve_root_node_address(nodes), port


def requeue(signum: int) -> str | None:
    """Ask SLURM to queue this job again if a signal announced its end, and return what came of it in words.

    Args:
        signum: Number of the signal.
    """
    job = job_id()
    if job is None or signal.Signals(signum).name not in REQUEUING:
        return None
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        return f"job {job} was not queued again ({error})"
    reason = " ".join(done.stderr.split())
    return f"job {job} was not queued again ({reason})" if done.returncode else f"job {job} is queued again"
