"""The figure and the table of docs/iterations.md: ``python docs/figures.py iterations ITERATION_DIR ...``.

Several directories of one kind of iteration, such as several seeds, are one line: the mean over them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spo.metrics.rounds import Measured, RoundMetrics, round_metrics
from spo.records.iteration import Iteration, read_iteration

HEADER = (
    "| iteration | round | against the first | against the previous | against the data | KL | entropy | length "
    + ("| reward | distinct-2 |\n" + "|---" * 10 + "|")
)
PANELS: Mapping[str, Callable[[RoundMetrics], Measured | None]] = {
    "win rate against the first model": lambda one: one.win_rates.get("first") if one.number else Measured(0.5),
    "win rate against the data": lambda one: one.win_rates.get("data"),
    "KL to the first model, nats": lambda one: one.kl_first,
    "reward": lambda one: one.reward,
    "entropy, nats per token": lambda one: one.entropy,
    "length, tokens": lambda one: one.length,
    "distinct-2": lambda one: one.distinct_2,
    "self-BLEU": lambda one: one.self_bleu,
}
Found = Mapping[str, Sequence[Sequence[RoundMetrics]]]
"""Metrics of the rounds of each directory, by kind of iteration."""


def iterations(*directories: Path) -> Figure:
    """Draw the rounds of iterations, and print their table.

    Args:
        directories: Directories of iterations.
    """
    found: dict[str, list[list[RoundMetrics]]] = defaultdict(list)
    for directory in directories:
        iteration = read_iteration(directory)
        found[iteration.name].append(_rounds(directory, iteration))
    print(HEADER)
    for name, several in found.items():
        for rounds in zip(*several, strict=True):
            print(_row(name, rounds))
    figure, panels = plt.subplots(2, 4, figsize=(15, 7), sharex=True)
    for axes, (title, measure) in zip(panels.flat, PANELS.items(), strict=True):
        _draw(axes, title, measure, found)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="lower center", ncol=len(found), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def _rounds(directory: Path, iteration: Iteration) -> list[RoundMetrics]:
    return [round_metrics(directory, iteration, one.number) for one in iteration.rounds]


def _mean(measured: Sequence[Measured | None]) -> Measured | None:
    """Return the mean over seeds, from the lowest to the highest end of their intervals."""
    known = [one for one in measured if one is not None]
    if not known:
        return None
    ends = [[end for one in known if (end := getattr(one, name)) is not None] for name in ("low", "high")]
    low, high = (choose(some) if some else None for choose, some in zip((min, max), ends, strict=True))
    return Measured(fmean(one.value for one in known), low, high)


def _row(name: str, rounds: Sequence[RoundMetrics]) -> str:
    """Return a row of the table."""

    def cell(measured: Sequence[Measured | None], digits: int) -> str:
        mean = _mean(measured)
        if mean is None:
            return ""
        text = f"{mean.value:.{digits}f}"
        has_ends = mean.low is not None and mean.high is not None
        return f"{text} [{mean.low:.{digits}f}, {mean.high:.{digits}f}]" if has_ends else text

    rates = [cell([one.win_rates.get(opponent) for one in rounds], 3) for opponent in ("first", "previous", "data")]
    others = [
        cell([getattr(one, key) for one in rounds], digits)
        for key, digits in (("kl_first", 2), ("entropy", 2), ("length", 1), ("reward", 2), ("distinct_2", 3))
    ]
    return f"| {' | '.join([name, str(rounds[0].number), *rates, *others])} |"


def _draw(axes: Axes, title: str, measure: Callable[[RoundMetrics], Measured | None], found: Found) -> None:
    for place, (name, several) in enumerate(found.items()):
        shift = 0.06 * (place - (len(found) - 1) / 2)  # So that intervals of several iterations stay apart.
        points = {rounds[0].number: _mean([measure(one) for one in rounds]) for rounds in zip(*several, strict=True)}
        known = {number: mean for number, mean in points.items() if mean is not None}
        [line] = axes.plot(
            [number + shift for number in known],
            [mean.value for mean in known.values()],
            "o-",
            markersize=4,
            linewidth=1.2,
            label=name,
        )
        for number, mean in known.items():
            if mean.low is not None and mean.high is not None:
                axes.plot([number + shift] * 2, [mean.low, mean.high], color=line.get_color(), linewidth=0.8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)


FIGURES = {"iterations": iterations}
