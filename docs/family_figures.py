"""The figure and the table of docs/family.md, which ``docs/figures.py`` makes: ``python docs/figures.py family SWEEP``.

All intervals and differences are those of ``spo.compare``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_figures import interval  # Beside this script.

import spo
from spo.comparison.compare import Method
from spo.resources import conf_dir
from spo.stats import Estimate

BASELINE = "dpo"
"""Method that the others are compared with."""
HEADER = "| method | win rate | minus DPO | KL | entropy | length | beta |\n" + "|---" * 7 + "|"
LABEL_HEIGHT = 0.017
"""Height of a name as a share of the axes, at which names keep a distance."""
LOWEST_WIN_RATE = 0.55
"""Methods below are listed in a corner: they would squeeze the others."""


def family(*sweeps: Path) -> Figure:
    """Draw the win rate of each method over KL and entropy, and print the table.

    Args:
        sweeps: One folder of run directories.

    Raises:
        SystemExit: There is not exactly one sweep.
    """
    if len(sweeps) != 1:
        raise SystemExit("family takes one sweep")
    comparison = spo.compare(sweeps[0], baseline=BASELINE)
    methods = sorted(comparison.methods, key=lambda method: -_value(method, "win_rate"))
    differences = {one.first: one.estimate for one in comparison.differences}
    print(HEADER)
    for method in methods:
        print(_row(method, differences.get(method.name)))
    for note in comparison.notes:
        print(f"note: {note}")
    groups = {method.name: _group(method.name) for method in methods}
    colors = dict(zip(sorted(set(groups.values())), plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    shown = [method for method in methods if _value(method, "win_rate") >= LOWEST_WIN_RATE]
    costs = {"kl": "KL to the reference, nats", "entropy": "entropy, nats per token"}
    figure, panels = plt.subplots(1, 2, figsize=(13, 9), sharey=True)
    for axes, (cost, name) in zip(panels, costs.items(), strict=True):
        axes.set_xscale("log" if cost == "kl" else "linear")
        for method in shown:
            at = (_value(method, cost), _value(method, "win_rate"))
            axes.plot(*at, "o", color=colors[groups[method.name]], markersize=5, zorder=3)
        _names(axes, [(_value(method, cost), _value(method, "win_rate"), method.name) for method in shown])
        axes.set_xlabel(name)
    panels[0].set_ylabel("win rate against the reference")
    left_out = [f"{m.name} {_value(m, 'win_rate'):.2f}, KL {_value(m, 'kl'):.0f}" for m in methods if m not in shown]
    panels[0].text(0.98, 0.02, "\n".join(["below:", *left_out]), transform=panels[0].transAxes, ha="right", fontsize=8)
    for group, color in colors.items():
        panels[1].plot([], [], "o", color=color, label=group)
    panels[1].legend(frameon=False, fontsize=8, loc="lower left")
    figure.tight_layout()
    return figure


def _names(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names right of the points, in order of their height, moved apart where they would cover each other."""
    axes.margins(x=0.2, y=0.12)
    axes.autoscale_view()
    to_share = axes.transAxes.inverted()
    placed: list[tuple[float, float]] = []
    middle = sum(point[1] for point in points) / len(points)
    for x, y, name in sorted(points, key=lambda point: abs(point[1] - middle)):
        across, up = to_share.transform(axes.transData.transform((x, y)))
        step = LABEL_HEIGHT / 4 * (1 if y >= middle else -1)
        while any(abs(across - a) < 0.17 and abs(up - b) < LABEL_HEIGHT for a, b in placed):
            up += step
        placed.append((across, up))
        line = {"arrowstyle": "-", "linewidth": 0.3, "color": "gray"}
        axes.annotate(
            name, (x, y), (across + 0.02, up), textcoords="axes fraction", fontsize=7, va="center", arrowprops=line
        )


def _group(name: str) -> str:
    """Return the heading of a method, from its yaml file."""
    return str(yaml.safe_load((conf_dir() / "method" / f"{name}.yaml").read_text())["group"])


def _row(method: Method, difference: Estimate | None) -> str:
    of_baseline = "" if difference is None else interval(difference, 3)
    cells = [f"`{method.name}`", interval(method.estimates["win_rate"], 3), of_baseline]
    cells += [
        interval(method.estimates["kl"], 1),
        f"{_value(method, 'entropy'):.2f}",
        f"{_value(method, 'length'):.0f}",
    ]
    return "| " + " | ".join([*cells, f"{method.best.runs[0].record.get('beta.value'):g}"]) + " |"


def _value(method: Method, metric: str) -> float:
    return method.estimates[metric].value


FIGURES: dict[str, Callable[..., Figure]] = {"family": family}
