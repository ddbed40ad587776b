"""Runs that are killed at random moments, in any of their processes, end as if they had not been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import TINY, environment, numbers, rows, spo, untimed

ONE = ("trainer.accelerator=cpu", "trainer.devices=1")
TWO = ("trainer.accelerator=cpu", "trainer.devices=2")
# In float64, where the order in which processes add up cannot change a sampled token.
COMMON = [TINY, "logger=record", "judge=none", "model.dtype=float64", "trainer.max_steps=12", "data.num_workers=0"]
COMMON += ["trainer.val_check_interval=3", "callbacks.checkpoint.every_n_steps=2", "trainer.log_every_n_steps=3"]
MAX_SECONDS = 300


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        words: Overrides beyond those of all kinds.
        processes: Number of processes that the command starts, 0 if it trains itself.
    """

    words: tuple[str, ...]
    processes: int = 0


KINDS = {
    "dpo": Kind(("method=dpo", *ONE)),
    "spo": Kind(("method=spo", *ONE)),
    "kto with a learned scale": Kind(("method=kto", *ONE)),
    "rpo of all pairs": Kind(("method=rpo", *ONE)),
    "following reference": Kind(("method=tr_dpo", *ONE)),
    "micro-batches": Kind(("method=spo", "data.micro_batch_size=3", *ONE)),
    "ddp dpo": Kind(("method=dpo", "strategy=ddp", *TWO), 2),
    "ddp spo": Kind(("method=spo", "strategy=ddp", *TWO), 2),
    "ddp kto": Kind(("method=kto", "strategy=ddp", *TWO), 2),
    "fsdp dpo": Kind(("method=dpo", "strategy=fsdp", *TWO), 2),
    "fsdp spo": Kind(("method=spo", "strategy=fsdp", *TWO), 2),
    "fsdp precomputed": Kind(("method=dpo", "reference=precomputed", "strategy=fsdp", *TWO), 2),
}
SLOW = [("spo", 2), ("ddp kto", 4), ("fsdp spo", 6)]
NIGHTLY = [("dpo", 1), ("ddp spo", 3), ("fsdp dpo", 5)]
NIGHTLY += [(name, 100 + seed) for seed, name in enumerate([*KINDS, *list(KINDS)[4:]])]


def descendants(process: int) -> list[int]:
    """Return the processes that a process has started, with those that they have started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            child = int(stat.parent.name)
            found += [child, *descendants(child)]
    return found


def killed(command: list[str], folder: Path, cache: Path, seconds: float, of: random.Random) -> bool:
    """Run a command, kill one of its processes after some time, and return whether it lived until then."""
    with (folder / "output.txt").open("a") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment(cache), stdout=output, stderr=output)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            ranks = [one for one in descendants(process.pid) if is_rank(one)]
            os.kill(of.choice([process.pid, *ranks]), signal.SIGKILL)
            process.wait(MAX_SECONDS)
            deadline = time.monotonic() + MAX_SECONDS
            while any(Path(f"/proc/{one}").exists() for one in ranks):  # They end when their supervisor does.
                assert time.monotonic() < deadline
                time.sleep(0.05)
            return True
    assert process.returncode == 0, (folder / "output.txt").read_text()[-4000:]
    return False


def is_rank(process: int) -> bool:
    try:
        return b"\0RANK=" in Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return False


def check(name: str, seed: int, folder: Path, cache: Path) -> None:
    """Kill a run at two random moments, let it finish, and compare it with one that was not killed."""
    kind, generator = KINDS[name], random.Random(seed)
    words = ["train", *COMMON, *kind.words]
    command = [str(Path(sys.executable).with_name("spo")), *words, "hydra.run.dir=broken"]
    started = time.monotonic()
    spo(*words, "hydra.run.dir=whole", folder=folder, cache=cache)
    seconds = time.monotonic() - started
    for _ in range(2):
        if not killed(command, folder, cache, generator.uniform(0.2, 0.95) * seconds, generator):
            break
    spo(*words, "hydra.run.dir=broken", folder=folder, cache=cache)
    whole, broken = numbers(folder / "whole"), numbers(folder / "broken")
    assert broken == pytest.approx(whole, rel=1e-9, abs=1e-9)
    timeless = [[untimed(row) for row in rows(folder / run / "history.jsonl")] for run in ("whole", "broken")]
    assert [row["step"] for row in timeless[1]] == [row["step"] for row in timeless[0]]
    for ours, theirs in zip(*timeless, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-9, abs=1e-9)
    assert not (folder / "broken/failure.json").exists()
    texts = [[row["completion"] for row in rows(folder / run / "samples.jsonl")] for run in ("whole", "broken")]
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), SLOW)
def test_a_killed_run_ends_as_one_that_was_not(name: str, seed: int, cache_dir: Path, tmp_path: Path) -> None:
    check(name, seed, tmp_path, cache_dir)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "seed"), NIGHTLY)
def test_runs_of_all_kinds_survive_kills(name: str, seed: int, cache_dir: Path, tmp_path: Path) -> None:
    check(name, seed, tmp_path, cache_dir)
