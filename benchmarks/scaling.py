"""Growth of our step's time and memory with the prompt's share, completions, vocabulary, batch, and SPO's samples.

Usage: ``python -m benchmarks.scaling [--json FILE] [--plot FOLDER] [--only CURVE ...] [--threads N]``

Each point is a process of its own. It warms up with a fit of one step and measures a fit of three steps, on made-up
pairs of exactly the stated lengths. The training path and the model of 1M parameters are those of the step benchmark.
Memory is the peak of the process's resident set over its size before the model was loaded. Memory of an accelerator
does not count.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.common import show, write_json
from benchmarks.workloads import REFRESH_EVERY, SIZES, SPO, VOCABULARY, Data, Lengths, Workload, environment
from spo.config.compose import compose
from spo.records.cache import build_alone, cached
from spo.stages.quiet import quiet_libraries

STEPS = 3
LENGTH = 256
"""Tokens of a prompt with its completion on the curve of the prompt's share."""
PROMPT, COMPLETION = 128, 64
"""Tokens of prompt and completion on the other curves."""


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        x: Place on the horizontal axis.
        line: Name of the line of the curve.
        prompt: Tokens of each prompt.
        completion: Tokens of each completion, chosen and rejected alike.
        vocabulary: Rows of the embedding matrix.
        overrides: Overrides of ``spo train``.
        refresh_every: Steps between two drawings of the regularizer's samples, or ``None`` if it draws none.
    """

    x: float
    line: str
    prompt: int = PROMPT
    completion: int = COMPLETION
    vocabulary: int = VOCABULARY
    overrides: tuple[str, ...] = field(default=("method=dpo",))
    refresh_every: int | None = None


@dataclass(frozen=True)
class Curve:
    """Points, and the label of their horizontal axis."""

    label: str
    points: list[Point]
    logarithmic: bool = True


def curves() -> dict[str, Curve]:
    """Return all curves by name: DPO as it comes and with ``speed=plain``, and SPO."""
    lines = {"DPO": ("method=dpo",), "DPO, speed=plain": ("method=dpo", "speed=plain")}

    def dpo(values: Sequence[float], settings: Callable[[Any], dict[str, Any]]) -> list[Point]:
        made = []
        for line, base in lines.items():
            for x in values:
                chosen = settings(x)
                extra = chosen.pop("overrides", ())
                made.append(Point(x, line, overrides=(*base, *extra), **chosen))
        return made

    def spo(x: int, **changed: int) -> Point:
        settings = {"num_samples": 8, "batch_size": 8, "max_new_tokens": COMPLETION, "refresh_every": REFRESH_EVERY}
        settings |= changed
        overrides = (SPO[0], *(f"regularizer.{key}={value}" for key, value in settings.items()))
        return Point(x, "SPO", overrides=overrides, refresh_every=settings["refresh_every"])

    def shared(share: float) -> dict[str, int]:
        prompt = max(round(LENGTH * share), 2)
        return {"prompt": prompt, "completion": LENGTH - prompt}

    return {
        "prompt_share": Curve("prompt's share of the tokens", dpo((0.0, 0.25, 0.5, 0.75, 0.9), shared), False),
        "completion_length": Curve("tokens of a completion", dpo((16, 64, 160, 320), lambda x: {"completion": x})),
        "vocabulary": Curve("vocabulary", dpo((8192, 32768, 131072, 262144), lambda x: {"vocabulary": x})),
        "batch": Curve("pairs of a step", dpo((4, 8, 16, 32), lambda x: {"overrides": (f"data.batch_size={x}",)})),
        "refresh_every": Curve("steps between two drawings", [spo(x, refresh_every=x) for x in (1, 2, 5, 10, 20)]),
        "num_samples": Curve("samples drawn and used", [spo(x, num_samples=x, batch_size=x) for x in (4, 8, 16, 32)]),
    }


# --- one point -----------------------------------------------------------------------------------------------------


def workload(point: Point, threads: int | None, cache: Path) -> Workload:
    """Return the fits of a point."""
    exact = Lengths((math.log(point.prompt), 0.0), (math.log(point.completion), 0.0), pairs=200)
    folder = cached(cache, "benchmark_pairs", {"lengths": asdict(exact), "seed": 0}, build_alone(exact.write))
    size = replace(SIZES["1m"], vocabulary=point.vocabulary)
    return Workload(size, Data("synthetic", folder / "x.jsonl"), STEPS, threads, cache)


def peak_memory() -> int:
    """Return the bytes of the largest resident set that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(point: Point, threads: int | None, cache: Path) -> tuple[float, float]:
    """Measure the seconds of a step and the MiB of memory; call it in a process of its own."""
    quiet_libraries()
    work = workload(point, threads, cache)
    before = peak_memory()
    work.fit(*point.overrides, steps=1)
    clock = work.fit(*point.overrides)
    return clock.per_step(STEPS, point.refresh_every), (peak_memory() - before) / 2**20


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, forked from this one, which has imported everything.

    Raises:
        RuntimeError: The process ended without a result.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{arguments} failed; see above") from None
    finally:
        process.join()


# --- all of them ---------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark that the command line asks for.

    Returns:
        The result that ``--json`` writes.
    """
    every = curves()
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=every, default=list(every), metavar="CURVE", help=", ".join(every))
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--json", metavar="FILE", help="where the result is written")
    parser.add_argument("--plot", metavar="FOLDER", type=Path, help="where performance_*.png are drawn")
    asked = parser.parse_args(arguments)
    cache = Path(compose(["model=tiny"], run_dir=".").paths.cache)
    todo = [(name, point) for name in asked.only for point in every[name].points]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.only}
    for name, point in track(todo, "points", transient=True, console=Console(stderr=True)):
        alone(_prepare, point, asked.threads, cache)  # making a tokenizer takes more memory than the fit
        seconds, memory = alone(measure, point, asked.threads, cache)
        found[name].append({"x": point.x, "line": point.line, "step_s": seconds, "memory_mib": memory})
    result = {"curves": found, "environment": environment()}
    for name, rows in found.items():
        table = [(row["line"], row["x"], row["step_s"], row["memory_mib"]) for row in rows]
        show(name, ["", every[name].label, "s per step", "MiB"], table)
    write_json(asked.json, result)
    if asked.plot is not None:
        plot(result, asked.plot)
    return result


def _prepare(point: Point, threads: int | None, cache: Path) -> None:
    workload(point, threads, cache)


def _short(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"


def plot(result: dict[str, Any], folder: Path) -> None:
    """Draw ``performance_scaling.png`` and ``performance_spo.png`` from the curves that were measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    every = curves()
    pages: dict[str, tuple[str, ...]] = {"scaling": ("prompt_share", "completion_length", "vocabulary", "batch")}
    pages["spo"] = ("refresh_every", "num_samples")
    colors = {"DPO": "#0072B2", "DPO, speed=plain": "#666666", "SPO": "#E69F00"}
    for page, names in pages.items():
        drawn = [name for name in names if name in result["curves"]]
        if not drawn:
            continue
        figure, axes = plt.subplots(2, len(drawn), figsize=(3.4 * len(drawn), 5.4), sharex="col", squeeze=False)
        for column, name in enumerate(drawn):
            rows, curve = result["curves"][name], every[name]
            for axis, key in zip(axes[:, column], ("step_s", "memory_mib"), strict=True):
                for line in dict.fromkeys(row["line"] for row in rows):
                    points = [(row["x"], row[key]) for row in rows if row["line"] == line]
                    axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colors[line], label=line)
                if curve.logarithmic:
                    axis.set_xscale("log", base=2)
                    axis.set_xticks([row["x"] for row in rows], [_short(row["x"]) for row in rows])
                    axis.minorticks_off()
                axis.set_ylim(0, 1.08 * max(row[key] for row in rows))
                axis.spines[["top", "right"]].set_visible(False)
            axes[1, column].set_xlabel(curve.label)
        axes[0, 0].set_ylabel("seconds per step")
        axes[1, 0].set_ylabel("MiB of memory")
        axes[0, 0].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(folder / f"performance_{page}.png", dpi=130)
        plt.close(figure)


if __name__ == "__main__":
    main()
