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
LABEL_HEIGHT = 0.021
"""Height of a name as a share of the axes, at which names keep a distance."""


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
    figure, panels = plt.subplots(1, 2, figsize=(12, 7.5), sharey=True)
    costs = {"kl": "KL to the reference, nats", "entropy": "entropy, nats per token"}
    for axes, (cost, name) in zip(panels, costs.items(), strict=True):
        for method in methods:
            at = (_value(method, cost), _value(method, "win_rate"))
            axes.plot(*at, "o", color=colors[groups[method.name]], markersize=5)
        _names(axes, [(_value(method, cost), _value(method, "win_rate"), method.name) for method in methods])
        axes.set_xlabel(name)
    panels[0].set_ylabel("win rate against the reference")
    for group, color in colors.items():
        panels[1].plot([], [], "o", color=color, label=group)
    panels[1].legend(frameon=False, fontsize=7.5, loc="lower left")
    figure.tight_layout()
    return figure


def _names(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points, moved up where they would cover each other."""
    axes.margins(x=0.12)
    axes.autoscale_view()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    placed: list[tuple[float, float]] = []
    for x, y, name in sorted(points, key=lambda point: (point[1], point[0])):
        across, up = (x - left) / (right - left), (y - bottom) / (top - bottom)
        while any(abs(across - a) < 0.11 and abs(up - b) < LABEL_HEIGHT for a, b in placed):
            up += LABEL_HEIGHT / 4
        placed.append((across, up))
        end = (x, bottom + up * (top - bottom))
        axes.annotate(name, (x, y), end, fontsize=6.5, xycoords="data", va="center", ha="left")


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
