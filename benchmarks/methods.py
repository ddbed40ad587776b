"""Time of an optimizer step of each method over that of DPO, on the same pairs and in the same process.

Every method trains on the training path of ``spo train``, with its own defaults. A loss that reads columns has made-up
numbers in them. A further reference is a second copy of the model. A loss of labelled completions reads both
completions of the same pairs. Methods that sample use the samples of the other step benchmarks.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics as stats
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from benchmarks.common import Contestant, Ratio, alternate, show
from benchmarks.workloads import REFRESH_EVERY, SPO, Data, Size, Workload, find_data, model_folder
from spo.config.compose import compose
from spo.config.groups import group_members
from spo.data.gold_columns import GOLD_COLUMNS, gold_columns
from spo.losses import Loss
from spo.records.cache import build_alone, cached
from spo.regularizers import GlobalKL
from spo.resources import conf_dir
from spo.types import LabelledLogps

BASE = "dpo"
WARM_UP_STEPS = 2


def method_keys(asked: str) -> list[str]:
    """Return the members of the config group ``method`` that are asked for, ``all`` or names with commas; DPO first.

    Raises:
        SystemExit: A name is not that of a method.
    """
    known = group_members([conf_dir()])["method"]
    names = known if asked == "all" else asked.split(",")
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--methods: there is no method {unknown[0]}; there are {', '.join(known)}")
    return [BASE, *(name for name in names if name != BASE)]


def with_columns(data: Data, cache: Path, pairs: int) -> Data:
    """Return the first pairs of a data set with a made-up value of each column that a loss reads."""

    def write(folder: Path) -> None:
        generator = random.Random(0)
        with (folder / "x.jsonl").open("w") as file:
            for row in data.rows()[:pairs]:
                texts = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
                columns = gold_columns(generator.gauss(1, 1), generator.gauss(0, 1), 0.0, GOLD_COLUMNS)
                file.write(json.dumps(texts | columns) + "\n")

    key = {"path": str(data.path), "pairs": pairs, "columns": list(GOLD_COLUMNS)}
    return Data(f"{data.name} with columns", cached(cache, "benchmark_columns", key, build_alone(write)) / "x.jsonl")


def overrides_of(key: str, size: Size, folder: Path) -> list[str]:
    """Return the overrides that train a method on pairs.

    Args:
        key: Member of the config group ``method``.
        size: Size of the model.
        folder: Folder of the model, which is each further reference too.
    """
    cfg = compose([f"method={key}"], run_dir=".")
    loss: Loss[Any] = instantiate(cfg.method.loss, _convert_="all")
    found = [f"method={key}", *(f"extra_references.{name}='{folder}'" for name in loss.extra_references)]
    if isinstance(instantiate(cfg.regularizer, _convert_="all"), GlobalKL):
        found += SPO[1:]
    if loss.inputs is LabelledLogps:
        # Each pair is two rows, and a completion of another prompt needs splits of several prompts.
        found += [f"data.batch_size={2 * size.pairs}", "data.splits.selection=0.1", "data.splits.test=0.1"]
    return found


def workload_of(key: str, size: Size, data: Data, steps: int, threads: int | None, cache: Path) -> Workload:
    """Return a workload whose rows have what a method reads."""
    folder = model_folder(size, data, cache)
    return Workload(size, data, steps, threads, cache, overrides=overrides_of(key, size, folder))


def contestant(workload: Workload) -> Contestant:
    """Return the seconds per step of a workload, as a function of the round."""

    def measure(number: int) -> float:
        clock = workload.fit(*workload.overrides, seed=number)
        return clock.per_step(workload.steps, None if clock.sampled is None else REFRESH_EVERY)

    workload.fit(*workload.overrides, steps=WARM_UP_STEPS)
    return measure


def compare_methods(size: Size, asked: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Measure the methods that ``--methods`` names, print two tables, and return the numbers."""
    source = find_data(asked.data, cache)
    data = with_columns(source, cache, pairs=20 * size.pairs * (asked.steps + WARM_UP_STEPS))
    contestants = {
        key: contestant(workload_of(key, size, data, asked.steps, asked.threads, cache))
        for key in method_keys(asked.methods)
    }
    seconds = alternate(contestants, asked.rounds)
    ratios = {key: Ratio.of(times, seconds[BASE]) for key, times in seconds.items()}
    rows = [(key, stats.median(seconds[key]), ratio) for key, ratio in ratios.items()]
    show(f"seconds per step of {size.pairs} pairs", ["", "s per step", f"over {BASE}"], rows)
    print(markdown(seconds, ratios))
    methods = {key: {"step_s": stats.median(seconds[key]), **ratios[key].entries("over_dpo")} for key in ratios}
    return {"methods": methods, "seconds": seconds}


def markdown(seconds: Mapping[str, Sequence[float]], ratios: Mapping[str, Ratio]) -> str:
    """Return the result as a Markdown table."""
    lines = ["| `method=` | ms per step | over DPO's |", "|---|---|---|"]
    lines += [f"| `{key}` | {1000 * stats.median(seconds[key]):.0f} | {ratio} |" for key, ratio in ratios.items()]
    return "\n".join(lines)
