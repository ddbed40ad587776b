"""Figures of docs/explanation/theory.md and docs/study.md: ``python docs/figures.py NAME SWEEP... [--out FOLDER]``.

Each command prints the numbers that the text quotes, and writes ``NAME.png``.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import family_figures  # Beside this script.
import iteration_figures
import matplotlib.pyplot as plt
import numpy as np
import study_figures
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# The palette of Okabe and Ito, which color-blind readers can distinguish.
BLUE, ORANGE, GREEN, RED, PURPLE, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
MODELS = {"tabular": ("table of logits", ORANGE, "o", 6.5), "tiny": ("transformer", BLUE, "x", 6)}
LEAK = {
    ("spo", "none"): ("SPO", GRAY, "-"),
    ("spo", "global_kl"): ("SPO + global KL", BLUE, "-"),
    ("spo", "local_kl"): ("SPO + local KL", ORANGE, "--"),
    ("dpo", "none"): ("DPO", RED, "-."),
    ("ipo", "none"): ("IPO", GREEN, ":"),
}
FIT_FROM = 200
"""Smallest number of pairs per prompt in the fit of the slope: with fewer, some responses are hardly compared."""


@dataclass(frozen=True)
class Run:
    """The results of a run directory.

    Attributes:
        config: Configuration of the run.
        metrics: Final metrics by key.
        history: Metrics during training, one row per logged step.
    """

    config: dict[str, Any]
    metrics: dict[str, float]
    history: list[dict[str, float]]

    @property
    def model(self) -> str:
        """Return the kind of model, a key of :data:`MODELS`."""
        return "tabular" if "tabular" in self.config["model"]["initial"]["_target_"] else "tiny"

    @property
    def regularizer(self) -> str:
        """Return the member of the group ``regularizer``."""
        name = self.config["regularizer"]["_target_"].rpartition(".")[2]
        return {"NoRegularizer": "none", "GlobalKL": "global_kl", "LocalKL": "local_kl"}[name]


def read_runs(sweep: Path) -> list[Run]:
    """Return the finished runs of a sweep.

    Raises:
        SystemExit: If the folder does not contain a finished run.
    """
    found = [
        Run(
            yaml.safe_load((file.parent / "config.yaml").read_text()),
            json.loads(file.read_text()),
            [json.loads(line) for line in (file.parent / "history.jsonl").read_text().splitlines()],
        )
        for file in sorted(sweep.glob("*/metrics.json"))
    ]
    if not found:
        raise SystemExit(f"{sweep} does not contain a finished run")
    return found


def group_by(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    """Group runs by a key, in the order of the keys."""
    groups = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(sorted(groups.items()))


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Fit a power law by least squares of the logarithms.

    Args:
        x: Positive x-coordinates of the points.
        y: Positive y-coordinates of the points.

    Returns:
        Exponent and factor.
    """
    exponent, logarithm = np.polyfit(np.log(x), np.log(y), 1)
    return float(exponent), float(np.exp(logarithm))


def alpha(*sweeps: Sequence[Run]) -> Figure:
    """Draw entropy against the coefficient that each sweep varies: reached (points) and of the optimum (lines)."""
    figure, panels = plt.subplots(1, len(sweeps), figsize=(7, 3.3), sharey=True, squeeze=False)
    data = sweeps[0][0].config["data"]
    uniform = np.log(sum(data["source"]["num_symbols"] ** length for length in range(data["max_new_tokens"] + 1)))
    for axes, runs in zip(panels[0], sweeps, strict=True):
        method = runs[0].config["method"]["name"].upper()
        name = "alpha" if len(group_by(runs, lambda run: run.config["alpha"]["value"])) > 1 else "beta"
        # One line for each model: with a reference, the optimum depends on the model that was its reference.
        for (model, _), line in group_by(runs, lambda run: (run.model, run.config["data"]["seed"])).items():
            line = sorted(line, key=lambda run: run.config[name]["value"])
            axes.plot(
                [run.config[name]["value"] for run in line],
                [run.metrics["exact/entropy_optimum"] for run in line],
                color=MODELS[model][1],
                lw=1,
                alpha=0.6,
            )
        for model, group in group_by(runs, lambda run: run.model).items():
            words, color, marker, size = MODELS[model]
            axes.plot(
                [run.config[name]["value"] for run in group],
                [run.metrics["exact/entropy"] for run in group],
                marker,
                color=color,
                markersize=size,
                fillstyle="none",
                label=f"reached, {words}",
            )
            differences = [abs(run.metrics["exact/entropy"] - run.metrics["exact/entropy_optimum"]) for run in group]
            farthest = max(run.metrics["exact/tv"] for run in group)
            print(
                f"{method}, {words}: {len(group)} runs, largest difference of entropy {max(differences):.1e} nats, "
                f"largest total variation {farthest:.1e}"
            )
        axes.set(xscale="log", xlabel=f"{name} of {method}")
        optimum = "softmax(r / alpha)" if name == "alpha" else "reference · exp(r / beta)"
        axes.set_title(f"{method}: {optimum}", fontsize=10)
        axes.axhline(uniform, color=GRAY, lw=0.8, ls=":")
    panels[0, 0].set_ylabel("entropy of the policy (nats per response)")
    panels[0, 0].text(0.1, uniform + 0.03, "uniform", color=GRAY, fontsize=8, va="bottom")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color=GRAY, lw=1))
    panels[0, -1].legend(handles, [*labels, "predicted, one line per world"], loc="lower right", fontsize=7.5)
    return figure


def labels(runs: Sequence[Run]) -> Figure:
    """Draw the distance to the optimum against the number of pairs with sampled labels, and the fitted power law."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    groups = group_by(runs, lambda run: run.config["data"]["source"]["num_pairs"])
    pairs = np.array(list(groups), dtype=float)
    measures = {
        "total variation": ("o", BLUE, lambda run: run.metrics["exact/tv"]),
        "√(KL / 2)": ("s", RED, lambda run: (run.metrics["exact/kl_optimum"] / 2) ** 0.5),
    }
    for words, (marker, color, measure) in measures.items():
        values = [np.array([measure(run) for run in group]) for group in groups.values()]
        means = np.array([value.mean() for value in values])
        axes.fill_between(pairs, [v.min() for v in values], [v.max() for v in values], color=color, alpha=0.15, lw=0)
        axes.plot(pairs, means, marker, color=color, markersize=5)
        fitted = pairs >= FIT_FROM
        exponent, factor = slope(pairs[fitted], means[fitted])
        axes.plot(pairs[fitted], factor * pairs[fitted] ** exponent, color=color, lw=1)
        axes.annotate(
            f"{words}\nslope {exponent:.2f}", (pairs[-1], means[-1]), (8, 2 if color == RED else -2), color=color,
            textcoords="offset points", fontsize=9, va="bottom" if color == RED else "top",
        )  # fmt: skip
        print(f"{words}: slope {exponent:.3f} from {FIT_FROM} pairs on; means {', '.join(f'{m:.4f}' for m in means)}")
    seeds = len(next(iter(groups.values())))
    axes.set(
        xscale="log", yscale="log", xlabel="pairs with sampled labels (per prompt)", ylabel="distance to the optimum"
    )
    axes.set_xlim(right=pairs[-1] * 2.6)
    axes.set_ylim(bottom=axes.get_ylim()[0] * 0.75)
    axes.set_title(
        f"means of {seeds} worlds (band: smallest to largest); line: fit from {FIT_FROM} pairs on", fontsize=9
    )
    return figure


def leak(runs: Sequence[Run]) -> Figure:
    """Draw the change of the probability of responses outside the data over training."""
    models = group_by(runs, lambda run: run.model)
    figure, panels = plt.subplots(1, len(models), figsize=(7.6, 3.5), sharey=True, squeeze=False)
    for axes, (model, group) in zip(panels[0], models.items(), strict=True):
        ends = []
        for key, same in group_by(group, lambda run: (run.config["method"]["name"], run.regularizer)).items():
            rows = [[row for row in run.history if "exact/mass_outside" in row] for run in same]
            steps = [row["step"] for row in rows[0]]
            mass = np.array([[row["exact/mass_outside"] for row in run] for run in rows])
            change = mass - mass[:, :1]
            print(
                f"{model}, {key[0]}, {key[1]}: outside {mass[:, 0].mean():.3f} -> {mass[:, -1].mean():.3f}, change "
                f"{change[:, -1].mean():+.3f} (from {change[:, -1].min():+.3f} to {change[:, -1].max():+.3f})"
            )
            if key in LEAK:
                words, color, style = LEAK[key]
                axes.fill_between(steps, change.min(0), change.max(0), color=color, alpha=0.12, lw=0)
                axes.plot(steps, change.mean(0), style, color=color, lw=1.5)
                ends.append((change.mean(0)[-1], words, color))
        axes.axhline(0, color="black", lw=0.6)
        axes.set(xlabel="optimizer step", xlim=(0, steps[-1]))
        axes.set_title(MODELS[model][0], fontsize=10)
        _label_ends(axes, ends)
    panels[0, 0].set_ylabel("probability outside the data,\nminus that of the reference")
    return figure


def kl_estimators(runs: Sequence[Run]) -> Figure:
    """Draw the distance of the trained policy to the exact optimum for each estimator of the KL."""
    figure, axes = plt.subplots(figsize=(7, 2.4))
    groups = group_by(runs, lambda run: run.config["regularizer"]["estimator"])
    for place, (name, group) in enumerate(groups.items()):
        values = np.array([run.metrics["exact/tv"] for run in group])
        axes.plot(values, np.full(len(values), place), "o", color=BLUE, fillstyle="none")
        axes.plot(values.mean(), place, "|", color=RED, markersize=16, markeredgewidth=2)
        print(f"{name}: total variation {values.mean():.4f} (from {values.min():.4f} to {values.max():.4f})")
    axes.set(xscale="log", xlabel="total variation to the optimum of SPO + beta KL (circles: worlds, bar: their mean)")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.margins(y=0.2)
    axes.invert_yaxis()
    return figure


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the names of curves to the right of their ends, and move them apart if they would overlap."""
    low, high = axes.get_ylim()
    place, least = -np.inf, 0.055 * (high - low)
    for end, words, color in sorted(ends):
        place = max(end, place + least)
        axes.annotate(
            words, (1, end), (1.02, place), xycoords=("axes fraction", "data"), textcoords=("axes fraction", "data"),
            color=color, fontsize=8, va="center",
        )  # fmt: skip


STUDIES: dict[str, Callable[..., Figure]] = {
    **study_figures.FIGURES,
    **family_figures.FIGURES,
    **iteration_figures.FIGURES,
}
"""Figures that compare sweeps and print their numbers."""
FIGURES: dict[str, Callable[..., Figure]] = {
    "alpha": alpha, "labels": labels, "leak": leak, "kl_estimators": kl_estimators
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> Path:
    """Draw one figure and return its file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*FIGURES, *STUDIES])
    parser.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP", help="folder of run directories")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images", metavar="FOLDER")
    given = parser.parse_args(arguments)
    plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    if given.name in FIGURES:
        figure = FIGURES[given.name](*map(read_runs, given.sweeps))
        figure.tight_layout()
    else:
        figure = STUDIES[given.name](*given.sweeps)
    given.out.mkdir(parents=True, exist_ok=True)
    of_sweep = f"_{given.sweeps[0].resolve().name}" if given.name in study_figures.ONE_SWEEP else ""
    file = given.out / f"{given.name}{of_sweep}.png"
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


if __name__ == "__main__":
    main()
