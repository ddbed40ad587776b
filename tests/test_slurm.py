"""Jobs through submitit: the request to SLURM and the results of the jobs, with a scheduler of a few lines."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from spo.config.compose import gpus_per_node, tasks_per_node
from tests.commands import history, numbers, shared_cache, spo
from tests.test_sweeps import FAST, STEPS

# sbatch: keeps the script, answers as SLURM does, and starts every task of the array with SLURM's variables.
SBATCH = """#!{python}
import os, re, shutil, subprocess, sys
script = sys.argv[-1]
shutil.copy(script, "{folder}/submitted.sh")
text = open(script).read()
if os.path.exists("{folder}/run"):
    last = int((re.search(r"--array=0-(\\d+)", text) or [0, 0])[1])
    for task in range(last + 1):
        variables = dict(SLURM_JOB_ID=str(100 + task), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(task))
        variables |= dict(SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
        variables |= dict(SLURM_JOB_NUM_NODES="1", SLURM_NNODES="1", SLURM_NODELIST="localhost")
        variables |= dict(SLURM_JOB_NODELIST="localhost", SLURM_JOB_NAME="spo")
        log = open("{folder}/task-%d.log" % task, "w")
        subprocess.Popen(["bash", script], env=os.environ | variables, stdout=log, stderr=log, start_new_session=True)
    print("Submitted batch job 7")
else:
    sys.exit("sbatch: error: invalid account")
"""
SRUN = """#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[2:] if words[0] in ("--output", "--error") else words[1:]
os.execvp(words[0], words)
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
"""


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_cache(tmp_path_factory)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of programs named like SLURM's, first on the path."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (folder / name).write_text(text.replace("{python}", sys.executable).replace("{folder}", str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


@pytest.mark.parametrize(
    ("devices", "tasks"), [(1, 1), (4, 4), ("4", 4), ("auto", 1), (-1, 1), ("0,1", 2), ([0, 2, 3], 3)]
)
def test_slurm_starts_one_task_per_device(devices: object, tasks: int) -> None:
    assert tasks_per_node(devices) == gpus_per_node(devices, "auto") == tasks
    assert gpus_per_node(devices, "cpu") is None


@pytest.mark.slow
def test_slurm_request_follows_the_configuration(cluster: Path, cache: Path, tmp_path: Path) -> None:
    words = ["train", "-m", "launcher=slurm", "method=dpo,ipo", "hydra.launcher.partition=big", "trainer.num_nodes=2"]
    devices = ["trainer.devices=4", "strategy=ddp", "trainer.accelerator=gpu", "hydra.launcher.timeout_min=60"]
    done = spo(*words, *devices, "hydra.sweep.dir=sweep", folder=tmp_path / "here", cache=cache, status=1)
    assert re.search(r"the jobs could not be launched: .*invalid account", done.stderr, re.DOTALL)
    assert "Traceback" not in done.stderr and "2 unfinished" in done.stdout
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", (cluster / "submitted.sh").read_text(), re.MULTILINE))
    assert asked["array"].startswith("0-1%") and asked["job-name"] == "spo" and asked["partition"] == "big"
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "4", "4")
    assert (asked["time"], asked["mem"], asked["cpus-per-task"]) == ("60", "32GB", "4")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "submitit_local"])
def test_submitit_runs_the_jobs(launcher: str, cluster: Path, cache: Path, tmp_path: Path) -> None:
    (cluster / "run").touch()
    words = ["train", "-m", f"launcher={launcher}", "method=dpo,ipo", *FAST, "hydra.sweep.dir=sweep"]
    done = spo(*words, folder=tmp_path / "here", cache=cache)
    assert "2 finished" in done.stdout
    sweep = tmp_path / "here/sweep"
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["finished"] * 2
    for job in jobs:
        assert numbers(sweep / job["directory"])
        assert [row["step"] for row in history(sweep / job["directory"])] == list(range(STEPS + 1))
    assert (cluster / "submitted.sh").exists() == (launcher == "slurm")
