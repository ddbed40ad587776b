"""Runs started by torchrun and by SLURM, as the documentation shows them, on two processes of this machine."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import slurm_programs
from tests.commands import environment, history, numbers, shared_cache, spo
from tests.test_docs import BLOCKS
from tests.test_sweeps import FAST

ON_TWO = ("strategy=ddp", "trainer.accelerator=cpu", "trainer.devices=auto", "method=dpo", *FAST, "logger=record")
LONG = (*ON_TWO, "trainer.max_steps=40", "trainer.val_check_interval=40", "trainer.log_every_n_steps=1")
JOB = "123"


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_cache(tmp_path_factory)


def documented(first_words: str) -> str:
    """Return the block of the guide that begins with some words."""
    [block] = [block.text for block in BLOCKS if block.tag == "launch" and block.text.startswith(first_words)]
    return block


def test_each_documented_command_of_a_launcher_runs_here() -> None:
    assert sorted(block.text.split()[0] for block in BLOCKS if block.tag == "launch") == ["#!/bin/bash", "torchrun"]


def torchrun(folder: Path, cache: Path, nodes: int, *words: str) -> list[subprocess.CompletedProcess[str]]:
    """Run the documented command with a process on each of some nodes, which are all this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = documented("torchrun").replace("\\\n", "").split()
    assert command[-4:-2] == ["train", "method=spo"] and command[-1].startswith("hydra.run.dir=")
    command[0] = str(Path(sys.executable).with_name("torchrun"))
    values = {"--nnodes": nodes, "--nproc-per-node": 2 // nodes, "--master-addr": "127.0.0.1", "--master-port": port}
    for name, value in values.items():
        command[command.index(name) + 1] = str(value)
    folder.mkdir(exist_ok=True)
    agents = []
    for node in range(nodes):
        command[command.index("--node-rank") + 1] = str(node)
        agents.append(
            subprocess.Popen(
                [*command[: command.index("train") + 1], *words],
                cwd=folder,
                env=environment(cache),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [agent.communicate() for agent in agents]
    return [
        subprocess.CompletedProcess(agent.args, agent.returncode, *output)
        for agent, output in zip(agents, outputs, strict=True)
    ]


@pytest.mark.slow
def test_torchrun_on_two_nodes_and_the_finished_run_again(cache: Path, tmp_path: Path) -> None:
    first, second = torchrun(tmp_path, cache, 2, *ON_TWO)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "Traceback" not in first.stderr + second.stderr and "result" in first.stdout and second.stdout == ""
    [run] = (tmp_path / "outputs/runs").iterdir()  # The clocks of the processes named two.
    spo("train", *ON_TWO, "trainer.devices=1", "hydra.run.dir=alone", folder=tmp_path, cache=cache)
    alone, two = numbers(tmp_path / "alone"), numbers(run)
    for key in ("train/loss", "val/loss", "eval/reward"):
        assert two[key] == pytest.approx(alone[key], rel=1e-4)
    before = (run / "metrics.json").stat().st_mtime_ns
    [again] = torchrun(tmp_path, cache, 1, "--resume", str(run))
    assert again.returncode == 0 and "Traceback" not in again.stderr and f"{run}/report.html" in again.stdout
    assert (run / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_torchrun_with_several_jobs_is_refused(cache: Path, tmp_path: Path) -> None:
    [done] = torchrun(tmp_path, cache, 1, "-m", "seed=1,2", *ON_TWO)
    sentence = "spo: -m: torchrun has started 2 processes, and a multirun starts those of its runs itself"
    assert done.returncode == 1 and done.stderr.count(sentence) == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_job_of_slurm_is_queued_again_and_resumes(name: str, cache: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    slurm_programs.install(programs)
    text = (
        documented("#!/bin/bash")
        .replace("--nodes=2", "--nodes=1")
        .replace("--ntasks-per-node=8", "--ntasks-per-node=2")
    )
    assert text.endswith("\nsrun spo train method=spo strategy=fsdp\n") and "--signal=USR1@" in text
    script = tmp_path / "job.sh"
    script.write_text(text.replace("method=spo strategy=fsdp", " ".join(f"'{word}'" for word in LONG)))
    job = slurm_programs.sbatch(programs, script, JOB, environment(cache))
    runs = tmp_path / "outputs/runs"
    while not any(len(history(run.parent)) > 5 for run in runs.glob("*/history.jsonl")):
        assert job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    [srun] = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    subprocess.run(["kill", "-s", name.removeprefix("SIG"), srun], check=True)  # To the step, not to the script.
    job.wait()
    [run] = runs.iterdir()
    assert run.name.startswith(f"slurm-{JOB}-") and not (run / "metrics.json").exists()
    assert (programs / "requeued").read_text() == f"requeue {JOB}\n"
    assert json.loads((run / "failure.json").read_text())["kind"] == "interrupted"
    log = (tmp_path / "log").read_text()
    assert f"spo: interrupted by {name}: step " in log and f"; job {JOB} is queued again; " in log
    assert "Traceback" not in log and job.returncode == 128 + getattr(signal, name)
    job = slurm_programs.sbatch(programs, script, JOB, environment(cache))
    assert job.wait() == 0, (tmp_path / "log").read_text()
    assert [path.name for path in runs.iterdir()] == [run.name] and not (run / "failure.json").exists()
    spo("train", *LONG, "trainer.devices=2", "hydra.run.dir=whole", folder=tmp_path, cache=cache)
    assert numbers(run) == numbers(tmp_path / "whole") and history(run) == history(tmp_path / "whole")
