"""Figures of docs/study.md, which ``docs/figures.py`` draws: ``python docs/figures.py study_NAME SWEEP...``.

An arm of a study is a method with a regularizer. All intervals and differences are those of ``spo.compare``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

import spo
from spo.comparison.choice import Setting
from spo.comparison.compare import Comparison, Method
from spo.comparison.runs import Run
from spo.stats import Estimate

# The colors of these methods on the comparison page.
COLORS = {"spo": "#0068a8", "dpo": "#c8500a", "ipo": "#00805d"}
OTHER_COLOR, GRAY = "#7f4bb3", "#666666"
REGULARIZERS = {"GlobalKL": "global", "LocalKL": "local", "NoRegularizer": "none"}
DASHES = {"global": "-", "local": "--", "none": ":"}
MARKERS = {"global": "o", "local": "s", "none": "^"}
COSTS = {"seconds": "time/train_s", "sampled tokens": "trained/sampled_tokens"}
SAMPLES = "val/samples/"
"""Beginning of the metrics of the samples at each validation."""
LOW_KL = 0.03
"""Smallest KL on a logarithmic axis, in nats: a policy that hardly moved is drawn at this value."""


@dataclass(frozen=True)
class Arm:
    """A method with a regularizer, in one study.

    Attributes:
        method: Name of the method, ``method.name``.
        regularizer: A key of :data:`DASHES`.
        group: Its group of the comparison: the settings, the best one, and the estimates of its metrics.
        setting: Setting whose numbers are shown, for a table; empty where there is one alone.
    """

    method: str
    regularizer: str
    group: Method
    setting: str

    @property
    def name(self) -> str:
        """Return the name in tables, such as ``SPO + global KL``."""
        return self.method.upper() + ("" if self.regularizer == "none" else f" + {self.regularizer} KL")

    @property
    def color(self) -> str:
        """Return the color of the method."""
        return COLORS.get(self.method, OTHER_COLOR)

    def row(self) -> str:
        """Return the numbers of the best setting as a line of a Markdown table."""
        win_rate, runs = self.group.estimates["win_rate"], self.group.best.runs
        cells = [self.name, self.setting, interval(win_rate, 3), interval(self.group.estimates["kl"], 1)]
        cells += [f"{self.group.estimates['entropy'].value:.2f}", f"{self.group.estimates['length'].value:.0f}"]
        for cost in COSTS.values():
            known = [number for run in runs if (number := run.number(cost)) is not None]
            cells.append(f"{fmean(known):,.0f}" if known else "unknown")
        return "| " + " | ".join([*cells, str(len(runs))]) + " |"


HEADER = "| arm | setting | win rate | KL | entropy | length | " + " | ".join(COSTS) + " | runs |\n" + "|---" * 9 + "|"


@dataclass(frozen=True)
class Study:
    """The runs of a sweep, compared by arm.

    Attributes:
        regime: Name of the study, without the data seed.
        data_seed: Seed of the data, ``data.seed``.
        arms: Arms in the order of their methods and regularizers.
        comparisons: Comparison of the arms by each main metric.
    """

    regime: str
    data_seed: int
    arms: list[Arm]
    comparisons: dict[str, Comparison]

    def difference(self, metric: str, method: str) -> Estimate | None:
        """Return the metric of a method with the global KL minus that with the local KL, ``None`` without both."""
        names = {arm.regularizer: arm.group.name for arm in self.arms if arm.method == method}
        for one in self.comparisons[metric].differences:
            found = one.estimate
            if (one.first, one.second) == (names.get("global"), names.get("local")):
                return found
            if (one.second, one.first) == (names.get("global"), names.get("local")):
                low, high = (None if end is None else -end for end in (found.high, found.low))
                return Estimate(-found.value, low, high, found.p)
        return None

    def print(self) -> None:
        """Print the numbers of every arm as a Markdown table."""
        print(f"\n{self.regime}, data.seed {self.data_seed}\n\n{HEADER}")
        for arm in self.arms:
            print(arm.row())
        for note in self.comparisons["win_rate"].notes:
            print(f"note: {note}")


def read_study(sweep: Path, *keys: str, metrics: Sequence[str] = ("win_rate",)) -> Study:
    """Compare the arms of a sweep.

    Args:
        sweep: Folder of run directories with one data seed.
        keys: Keys that make arms in addition to method and regularizer, such as ``optimizer.lr``.
        metrics: Metrics to compare the arms by.

    Raises:
        UserError: If the runs cannot be compared fairly.
        SystemExit: If the runs have several data seeds.
    """
    by = ("method", "regularizer", *keys)
    comparisons = {metric: spo.compare(sweep, by=by, metric=f"eval/{metric}") for metric in metrics}
    arms = [
        Arm(group.best.runs[0].method, REGULARIZERS[_target(group.best.runs[0])], group, _words_of_setting(group, keys))
        for group in comparisons[metrics[0]].methods
    ]
    order = (list(COLORS), list(DASHES))
    arms.sort(
        key=lambda arm: (
            order[0].index(arm.method) if arm.method in COLORS else len(COLORS),
            order[1].index(arm.regularizer),
            *(arm.group.best.runs[0].setting[key] for key in keys),
        )
    )
    seeds = {run.setting["data.seed"] for arm in arms for run in arm.group.best.runs}
    if len(seeds) > 1:
        raise SystemExit(f"{sweep} contains runs of several data seeds: {sorted(seeds)}")
    regime = re.sub(r"_data-\d+$", "", sweep.resolve().name).replace("_", " ")
    return Study(regime, seeds.pop(), arms, comparisons)


def _target(run: Run) -> str:
    return str(run.setting["regularizer._target_"]).rpartition(".")[2]


def _words_of_setting(group: Method, keys: Sequence[str]) -> str:
    if keys:
        return ", ".join(f"{key} {group.best.runs[0].setting[key]:g}" for key in keys)
    return group.best.label if len(group.settings) > 1 else ""


def interval(estimate: Estimate, digits: int) -> str:
    """Write a number with its interval."""
    ends = "" if estimate.low is None else f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
    return f"{estimate.value:.{digits}f}{ends}"


def paths(sweep: Path) -> Figure:
    """Draw win rate and KL of the samples at each validation over the steps, a panel per method."""
    study = read_study(sweep)
    study.print()
    methods = list(dict.fromkeys(arm.method for arm in study.arms))
    figure, panels = plt.subplots(
        2, len(methods), figsize=(7.6, 5), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for arm in study.arms:
        for axes, metric in zip(panels[:, methods.index(arm.method)], ("win_rate", "kl"), strict=True):
            steps, values = curves(arm.group.best.runs, SAMPLES + metric)
            axes.plot(steps, values.mean(0), DASHES[arm.regularizer], color=arm.color, lw=1.6)
            axes.fill_between(steps, values.min(0), values.max(0), color=arm.color, alpha=0.13, lw=0)
            print(f"{arm.name}, {metric} over steps: " + ", ".join(_points(steps, values.mean(0))))
    for axes, method in zip(panels[0], methods, strict=True):
        axes.set_title(method.upper(), loc="left", color=COLORS.get(method, OTHER_COLOR), fontsize=10)
        axes.axhline(0.5, color=GRAY, lw=0.6)
    panels[0, 0].set_ylabel("win rate, selection split")
    panels[1, 0].set_ylabel("KL (nats per sequence)")
    for axes in panels[1]:
        axes.set_yscale("symlog", linthresh=1, linscale=0.5)
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set(xlabel="optimizer step", ylim=(0, None), xlim=(0, None))
    seeds = len(study.arms[0].group.best.runs)
    _legend_below(figure, _regularizer_lines(study.arms), f"lines: means of {seeds} seeds; bands: smallest to largest")
    return figure


def regimes(*sweeps: Path) -> Figure:
    """Draw the difference between global and local KL in win rate and in KL, by regime and method."""
    studies = [read_study(sweep, metrics=("win_rate", "kl")) for sweep in sweeps]
    for study in studies:
        study.print()
    rows = [
        (regime, method)
        for regime in dict.fromkeys(study.regime for study in studies)
        for method in COLORS
        if any(study.regime == regime and study.difference("kl", method) for study in studies)
    ]
    if not rows:
        raise SystemExit("no sweep contains a method with both the global and the local KL")
    figure, panels = plt.subplots(1, 2, figsize=(7.6, 1.1 + 0.42 * len(rows)), sharey=True, layout="constrained")
    seeds = sorted({study.data_seed for study in studies})
    for metric, axes, words, digits in zip(
        ("win_rate", "kl"), panels, ("win rate", "KL (nats per sequence)"), (3, 1), strict=True
    ):
        axes.axvline(0, color=GRAY, lw=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"{words}: global minus local KL")
        for study in studies:
            for place, (regime, method) in enumerate(rows):
                if study.regime == regime and (found := study.difference(metric, method)):
                    shift = 0.3 * (seeds.index(study.data_seed) - (len(seeds) - 1) / 2) / max(1, len(seeds) - 1)
                    filled = study.data_seed == seeds[0]
                    whisker(axes, found, place + shift, COLORS[method], filled=filled)
                    print(f"{regime}, data.seed {study.data_seed}, {method.upper()}, {words}: global minus local "
                          f"{interval(found, digits)}")  # fmt: skip
    panels[0].set_yticks(range(len(rows)), [f"{regime}, {method.upper()}" for regime, method in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    for label, (_, method) in zip(panels[0].get_yticklabels(), rows, strict=True):
        label.set_color(COLORS[method])
    for place in range(1, len(rows)):
        if rows[place][0] != rows[place - 1][0]:
            for axes in panels:
                axes.axhline(place - 0.5, color=GRAY, lw=0.4)
    _legend_below(figure, _seed_marks(seeds, "o"), "bars: 95% intervals over seeds and prompts")
    return figure


def frontier(*sweeps: Path) -> Figure:
    """Draw win rate over KL of the selected setting of each arm, a panel per regime, and all settings as dots."""
    studies = [read_study(sweep) for sweep in sweeps]
    names = list(dict.fromkeys(study.regime for study in studies))
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    size = (7.6 if columns > 1 else 5.5, 0.5 + 2.9 * rows)
    figure, panels = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    seeds = sorted({study.data_seed for study in studies})
    for study in studies:
        study.print()
        axes = panels.flat[names.index(study.regime)]
        for arm in study.arms:
            for setting in arm.group.settings if len(arm.group.settings) > 1 else ():
                axes.plot(*_means(setting), ".", color=arm.color, ms=4, alpha=0.5, mew=0)
            x, y = arm.group.estimates["kl"], arm.group.estimates["win_rate"]
            filled = study.data_seed == seeds[0]
            whisker(axes, x, y.value, arm.color, MARKERS[arm.regularizer], filled=filled, least=LOW_KL)
            axes.plot([max(x.value, LOW_KL)] * 2, [y.low, y.high], color=arm.color, lw=1, alpha=0.6, zorder=1)
    for axes, name in zip(panels.flat, names, strict=False):
        axes.set_title(name, loc="left", fontsize=10)
        axes.axhline(0.5, color=GRAY, lw=0.6)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    panels[0, 0].set_xscale("log")
    _log_axis(panels[0, 0].xaxis)
    for axes in panels[:, 0]:
        axes.set_ylabel("win rate, test split")
    for place in range(len(names)):
        if place + columns >= len(names):
            panels.flat[place].set_xlabel("KL to the reference (nats per sequence)")
            panels.flat[place].tick_params(labelbottom=True)
    arms = [arm for study in studies for arm in study.arms]
    lines = [
        *(Line2D([], [], color=color, lw=3, label=method.upper()) for method, color in COLORS.items()
          if any(arm.method == method for arm in arms)),
        *(Line2D([], [], color=GRAY, marker=MARKERS[one], lw=0, label=_words(one)) for one in _regularizers(arms)),
        *(_seed_marks(seeds, "D") if len(seeds) > 1 else []),
    ]  # fmt: skip
    _legend_below(figure, lines, "bars: 95% intervals over seeds and prompts")
    return figure


def learning_rate(sweep: Path) -> Figure:
    """Draw win rate and KL of each arm over the learning rate."""
    study = read_study(sweep, "optimizer.lr")
    study.print()
    figure, panels = plt.subplots(1, 2, figsize=(7.6, 3.6), layout="constrained")
    lines = list(dict.fromkeys((arm.method, arm.regularizer) for arm in study.arms))
    for place, key in enumerate(lines):
        some = [arm for arm in study.arms if (arm.method, arm.regularizer) == key]
        # Marks at the same learning rate stand side by side.
        rates = np.array([float(arm.group.best.runs[0].setting["optimizer.lr"]) for arm in some])
        rates = rates * 1.05 ** (place - (len(lines) - 1) / 2)
        for axes, metric in zip(panels, ("win_rate", "kl"), strict=True):
            found = [arm.group.estimates[metric] for arm in some]
            values = [one.value for one in found]
            axes.plot(rates, values, DASHES[key[1]] + MARKERS[key[1]], color=some[0].color, lw=1.4, ms=4.5)
            for rate, one in zip(rates, found, strict=True):
                if one.low is not None and one.high is not None:
                    axes.plot([rate] * 2, [one.low, one.high], color=some[0].color, lw=1, alpha=0.6)
    rates = sorted({float(arm.group.best.runs[0].setting["optimizer.lr"]) for arm in study.arms})
    for axes in panels:
        axes.set(xscale="log", xlabel="learning rate")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.xaxis.set_minor_locator(plt.NullLocator())
    panels[0].axhline(0.5, color=GRAY, lw=0.6)
    panels[0].set_ylabel("win rate, test split")
    panels[1].set(yscale="log", ylabel="KL (nats per sequence)")
    _log_axis(panels[1].yaxis)
    first = {(arm.method, arm.regularizer): arm for arm in study.arms}
    marks = [
        Line2D([], [], color=arm.color, ls=DASHES[arm.regularizer], marker=MARKERS[arm.regularizer], label=arm.name)
        for arm in first.values()
    ]
    _legend_below(figure, marks, "bars: 95% intervals over seeds and prompts")
    return figure


def curves(runs: Sequence[Run], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps at which all runs logged a metric, ``(N,)``, and its values, ``(len(runs), N)``.

    Raises:
        SystemExit: If there is no such step.
    """
    found = [dict(zip(*run.record.curve(metric), strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(one) for one in found)))
    if not steps:
        raise SystemExit(f"the runs do not share a step with {metric}: were they trained with callbacks=samples?")
    return np.array(steps), np.array([[one[step] for step in steps] for one in found])


def whisker(
    axes: Axes, x: Estimate, y: float, color: str, marker: str = "o", *, filled: bool, least: float | None = None
) -> None:
    """Draw an estimate with a horizontal interval; values below ``least`` are drawn there."""

    def limit(value: float) -> float:
        return value if least is None else max(value, least)

    if x.low is not None and x.high is not None:
        axes.plot([limit(x.low), limit(x.high)], [y, y], color=color, lw=1, alpha=0.6, zorder=1)
    axes.plot(limit(x.value), y, marker, color=color, mfc=color if filled else "white", ms=5.5, mew=1.3)


def _points(steps: Sequence[float], values: Sequence[float]) -> list[str]:
    return [f"{step:.0f}: {value:.3f}" for step, value in zip(steps, values, strict=True)]


def _means(setting: Setting) -> tuple[float, float]:
    """Return KL and win rate of a setting, means over its seeds."""
    kl, win_rate = (
        fmean(number for run in setting.runs if (number := run.number(f"eval/{metric}")) is not None)
        for metric in ("kl", "win_rate")
    )
    return max(kl, LOW_KL), win_rate


def _regularizers(arms: Sequence[Arm]) -> list[str]:
    return [name for name in DASHES if any(arm.regularizer == name for arm in arms)]


def _words(regularizer: str) -> str:
    return "no KL" if regularizer == "none" else f"{regularizer} KL"


def _regularizer_lines(arms: Sequence[Arm]) -> list[Line2D]:
    return [Line2D([], [], color=GRAY, ls=DASHES[name], label=_words(name)) for name in _regularizers(arms)]


def _seed_marks(seeds: Sequence[int], marker: str) -> list[Line2D]:
    return [
        Line2D([], [], color=GRAY, marker=marker, mfc=GRAY if place == 0 else "white", lw=0, label=f"data.seed {seed}")
        for place, seed in enumerate(seeds)
    ]


def _log_axis(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_below(figure: Figure, lines: Sequence[Line2D], words: str) -> None:
    """Put a legend below the panels, with a line of words about the intervals as its title."""
    figure.legend(
        handles=lines, loc="outside lower center", ncols=min(6, len(lines)), title=words, title_fontsize=8, fontsize=8,
        frameon=False,
    )  # fmt: skip


ONE_SWEEP = ("study_paths", "study_learning_rate")
"""Figures of a single sweep, whose name is part of the file's name."""
FIGURES: dict[str, Callable[..., Figure]] = {
    "study_paths": paths,
    "study_regimes": regimes,
    "study_frontier": frontier,
    "study_learning_rate": learning_rate,
}
