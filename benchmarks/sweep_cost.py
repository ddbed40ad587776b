"""Savings of a sweep, whose jobs share one reference model, one set of pairs and one pass of the reference.

Usage: ``python -m benchmarks.sweep_cost [--jobs N] [--json FILE] [OVERRIDE ...]``

The benchmark runs ``spo train -m seed=0,1,...`` with an empty cache, then the same number of separate commands with an
empty cache each. Both are timed by the clock on the wall, so starting the interpreter counts. ``OVERRIDE`` is an
override of ``spo train``, by default ``+debug=tiny`` with precomputed reference log-probs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.common import show, write_json
from benchmarks.workloads import environment

DEFAULT_OVERRIDES = ("+debug=tiny", "method=dpo", "reference=precomputed")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark that the command line asks for.

    Returns:
        The result that ``--json`` writes.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.sweep_cost", description=__doc__.split("\n")[0])
    parser.add_argument(
        "overrides", nargs="*", default=list(DEFAULT_OVERRIDES), metavar="OVERRIDE", help="of spo train"
    )
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--json", metavar="FILE", help="where the result is written")
    asked = parser.parse_args(arguments)
    seeds = range(asked.jobs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = {
            "one sweep": _timed(
                [f"seed={','.join(map(str, seeds))}", f"hydra.sweep.dir={folder}/sweep", *asked.overrides, "-m"],
                folder / "cache",
            ),
            "separate runs": sum(
                _timed(
                    [f"seed={seed}", f"hydra.run.dir={folder}/runs/{seed}", *asked.overrides],
                    folder / f"cache-{seed}",
                )
                for seed in seeds
            ),
        }
        runs = {"one sweep": folder / "sweep", "separate runs": folder / "runs"}
        preparing = {kind: _prepare_seconds(where) for kind, where in runs.items()}
        caches = {"one sweep": [folder / "cache"], "separate runs": [folder / f"cache-{seed}" for seed in seeds]}
        models = {kind: sum(map(_reference_models, where)) for kind, where in caches.items()}
    rows = [(kind, seconds[kind], preparing[kind], models[kind]) for kind in runs]
    columns = ["", "seconds in all", "of them preparing", "reference models made"]
    show(f"{asked.jobs} jobs: {' '.join(asked.overrides)}", columns, rows)
    result: dict[str, Any] = {"jobs": asked.jobs, "overrides": asked.overrides, "environment": environment()}
    for key, kind in (("sweep", "one sweep"), ("separate", "separate runs")):
        result |= {f"{key}_s": seconds[kind], f"{key}_prepare_s": preparing[kind], f"{key}_models": models[kind]}
    result["ratio"] = result["separate_s"] / result["sweep_s"]
    print(f"separate runs take {result['ratio']:.2f} times as long")
    write_json(asked.json, result)
    return result


def _timed(words: Sequence[str], cache: Path) -> float:
    started = perf_counter()
    subprocess.run(
        [sys.executable, "-m", "spo", "train", "logger=record", *words],
        env={**os.environ, "SPO_CACHE_DIR": str(cache)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return perf_counter() - started


def _prepare_seconds(folder: Path) -> float:
    """Return the seconds that the runs of a folder spent before their first step."""
    return sum(json.loads(file.read_text())["time/prepare_s"] for file in folder.rglob("metrics.json"))


def _reference_models(cache: Path) -> int:
    """Return the number of reference models in a cache."""
    return sum(path.is_dir() for path in (cache / "sft").iterdir())


if __name__ == "__main__":
    main()
