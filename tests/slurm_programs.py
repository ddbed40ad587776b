"""Programs named like SLURM's, of a few lines, which run a batch script on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# srun: starts the tasks of a step with the variables that SLURM sets, and passes signals on to all of them.
SRUN = """#!{python}
import json, os, signal, subprocess, sys
tasks, number = int(os.environ["SLURM_NTASKS"]), open("{folder}/steps", "a")
number.write("x")
variables = dict(SLURM_STEP_ID=str(number.tell()), SLURM_STEP_NUM_TASKS=str(tasks), SLURM_STEP_NUM_NODES="1")
variables |= dict(SLURM_STEP_NODELIST="localhost")
started = []
def relay(signum, frame):
    for task in started:
        task.send_signal(signum)
for signum in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(signum, relay)
for rank in range(tasks):
    own = dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NODEID="0")
    started.append(subprocess.Popen(sys.argv[1:], env=os.environ | variables | own))
statuses = [task.wait() for task in started]
sys.exit(max(abs(status) for status in statuses))
"""
# scontrol requeue JOB: notes the request.
SCONTROL = """#!{python}
import sys
open("{folder}/requeued", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


def install(folder: Path) -> None:
    """Write the programs into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text.replace("{python}", sys.executable).replace("{folder}", str(folder)))
        (folder / name).chmod(0o755)


def sbatch(programs: Path, script: Path, job: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a batch script as a job of SLURM on one node, as ``sbatch`` and each requeue do.

    Args:
        programs: Folder of :func:`install`.
        script: Batch script. Its ``--ntasks-per-node`` is the number of tasks.
        job: Id of the job.
        environment: Environment variables of the job.
    """
    [tasks] = [line.partition("=")[2] for line in script.read_text().splitlines() if "--ntasks-per-node=" in line]
    own = {"SLURM_JOB_ID": job, "SLURM_JOB_NAME": script.name, "SLURM_NTASKS": tasks, "SLURM_NNODES": "1"}
    own |= {"SLURM_NTASKS_PER_NODE": tasks, "SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), environment["PATH"]])
    with (script.parent / "log").open("a") as log:
        return subprocess.Popen(
            ["bash", script],
            cwd=script.parent,
            env=environment | own | {"PATH": path},
            stdout=log,
            stderr=log,
            text=True,
        )
