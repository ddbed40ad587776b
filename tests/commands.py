"""Helpers to run the command in its own process or in this one, and to read what it wrote."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from spo.config.compose import compose
from spo.stages.train import train

TINY = "+debug=tiny"
SECRETS = {"WANDB_API_KEY": "5ec2e7" * 6 + "0000", "HF_TOKEN": "hf_SecretOfTheEnvironment0123456789"}
Numbers = dict[str, float]


def spo(*words: str, folder: Path, cache: Path, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``spo WORDS`` in ``folder`` and check its exit status.

    Args:
        words: Arguments of the command.
        folder: Working directory, which is created.
        cache: Folder of the cache.
        status: Expected exit status.
        variables: Further environment variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [Path(sys.executable).with_name("spo"), *words],
        cwd=folder,
        env=environment(cache, **variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, f"spo {' '.join(words)}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done


def environment(cache: Path, **variables: str) -> dict[str, str]:
    """Return this process's environment variables without secrets, with one thread to make sums reproducible."""
    kept = {name: value for name, value in os.environ.items() if name not in ("SPO_DEBUG", *SECRETS)}
    return {**kept, "SPO_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **variables}


def job(run_dir: Path, cache: Path, *overrides: str) -> Numbers:
    """Run ``spo train OVERRIDES`` in this process without W&B, and return its metrics without times."""
    torch.set_num_threads(1)
    cfg = compose([f"paths.cache={cache}", "logger=record", *overrides], run_dir=run_dir)
    return untimed(train(cfg))


def enter(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare for ``cli.main`` as a person does who types ``spo`` in ``folder``."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SPO_CACHE_DIR", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))  # The command adds the working directory.


def numbers(run_dir: Path) -> Numbers:
    """Read ``metrics.json`` without times and speeds."""
    return untimed(json.loads((run_dir / "metrics.json").read_text()))


def untimed(metrics: Numbers) -> Numbers:
    return {key: value for key, value in metrics.items() if not key.startswith("time/")}


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def history(run_dir: Path) -> list[Numbers]:
    """Read ``history.jsonl`` without times and speeds."""
    return [untimed(row) for row in rows(run_dir / "history.jsonl")]


def entries(cache: Path, kind: str) -> list[Path]:
    """Return the folders of a kind of results in the cache."""
    return sorted(path for path in (cache / kind).glob("*") if path.is_dir())


def shared_cache(factory: pytest.TempPathFactory) -> Path:
    """Return one cache for all tests that need the reference model of ``+debug=tiny``."""
    folder = shared_folder(factory) / "shared cache"  # The fixture `cache_dir` returns the same folder.
    folder.mkdir(exist_ok=True)
    return folder


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of this test session, the same in every worker of pytest-xdist."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


# The reference model of the sweep gets few training steps, since no test depends on its quality.
SWEPT = (TINY, "sft.max_steps=10")


@dataclass(frozen=True)
class Sweep:
    """The six jobs of ``method=spo,dpo,ipo seed=1,2``, run with a cold cache and secrets in the environment."""

    folder: Path
    cache: Path
    cached: dict[str, int]
    done: subprocess.CompletedProcess[str]

    def directory(self, method: str, seed: int = 1) -> Path:
        [found] = self.folder.glob(f"sweep/*method-{method}_seed-{seed}*")
        return found


def sweep(factory: pytest.TempPathFactory) -> Sweep:
    """Return the sweep, which the first worker that needs it runs while the others wait."""
    return _sweep(shared_folder(factory) / "six jobs")


@cache
def _sweep(folder: Path) -> Sweep:
    result = folder.with_name("six jobs.pickle")
    with FileLock(folder.with_name("six jobs.lock")):
        if not result.exists():
            cold = folder.with_name("cold cache")
            words = ["train", "-m", *SWEPT, "method=spo,dpo,ipo", "seed=1,2", "hydra.sweep.dir=sweep"]
            done = spo(*words, folder=folder, cache=cold, WANDB_MODE="offline", **SECRETS)
            cached = {kind: len(entries(cold, kind)) for kind in ("sft", "pairs")}
            result.write_bytes(pickle.dumps(Sweep(folder, cold, cached, done)))
        return pickle.loads(result.read_bytes())
