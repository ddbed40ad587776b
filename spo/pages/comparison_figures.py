"""Figures of a comparison: the colors of its methods, the main metric, frontiers, and head to head."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from markupsafe import Markup

from spo.comparison.choice import Setting, pareto
from spo.comparison.compare import Comparison, Method
from spo.comparison.runs import Run
from spo.metrics.catalogue import SHARE, find, label, unit
from spo.pages.charts import HUES, Cloud, Point, Tile, Whisker, scatter, tiles, whiskers
from spo.pages.comparison_words import describe_p_value
from spo.wording import number


def hues(comparison: Comparison) -> dict[str, int]:
    """Assign each method a color and a shape that do not depend on its results."""
    names = sorted((method.name for method in comparison.methods), key=lambda name: (name != "spo", name))
    return {name: 1 + place % HUES for place, name in enumerate(names)}


# --- the main metric -----------------------------------------------------------------------------------------------


def headline(comparison: Comparison) -> Markup:
    """Draw the main metric of each method with its interval."""
    metric, hue = comparison.metric_name, hues(comparison)
    rows = []
    for method in comparison.methods:
        one = method.estimates[metric]
        description = f"{method.name}\n{label(metric)} {number(one.value)}"
        if one.low is not None and one.high is not None:
            description += f"\n{comparison.bootstrap.confidence:.0%} interval {number(one.low)} to {number(one.high)}"
        mark = " (!)" if method.problems else ""
        rows.append(Whisker(method.name + mark, hue[method.name], one.value, one.low, one.high, description))
    even = even_share(metric)
    if even is not None:
        return whiskers(rows, axis_name(metric), SHARE, even)
    return whiskers(rows, axis_name(metric), None, comparison.reference.get(metric))


def even_share(metric: str) -> float | None:
    """Return the share at which neither side is ahead, for a metric that is such a share."""
    entry = find(metric)
    return entry.neutral if entry is not None and entry.bounds == SHARE else None


def axis_name(metric: str) -> str:
    """Return the name of a metric with its unit."""
    return ", ".join(part for part in (label(metric), unit(metric)) if part)


# --- frontier ------------------------------------------------------------------------------------------------------


def frontier(comparison: Comparison, cost: str) -> Markup | None:
    """Draw every run by the main metric and its cost, with a line through the best settings of each method.

    Args:
        comparison: Comparison to show.
        cost: Metric on the horizontal axis, ``kl`` or ``entropy``; less KL and more entropy are better.

    Returns:
        The chart; ``None`` if no run has both metrics, or the two are the same.
    """
    metric, hue = comparison.metric_name, hues(comparison)
    if metric == cost:
        return None
    sign = -1.0 if cost == "entropy" else 1.0
    gain = -1.0 if comparison.higher is False else 1.0
    clouds = []
    for method in comparison.methods:
        points, means = [], []
        for setting in method.settings:
            at = []
            for run in setting.runs:
                x, y = final(run, cost), final(run, metric)
                if x is not None and y is not None:
                    at.append((x, y))
                    points.append(Point(x, y, _describe(method, setting, f"seed {run.seed}", {metric: y, cost: x})))
            if at:
                x, y = (fmean(values) for values in zip(*at, strict=True))
                seeds = f"mean of {len(at)} seeds" if len(at) > 1 else "one seed"
                description = _describe(method, setting, seeds, {metric: y, cost: x})
                means.append(
                    Point(x, y, description, large=True, ring=setting is method.best and len(method.settings) > 1)
                )
        front = [means[i] for i in pareto([(sign * p.x, gain * p.y) for p in means])]
        corners = [(p.x, p.y) for p in front] if len(front) > 1 else []
        clouds.append(Cloud(method.name, hue[method.name], [*points, *means], corners))
    if not any(cloud.points for cloud in clouds):
        return None
    reference = comparison.reference
    start = (reference[cost], reference[metric]) if cost in reference and metric in reference else None
    return scatter(clouds, axis_name(cost), axis_name(metric), start, even_share(metric), stretched=cost == "kl")


def final(run: Run, metric: str) -> float | None:
    """Return a number of the test split."""
    return run.record.metric(f"eval/{metric}")


def _describe(method: Method, setting: Setting, seeds: str, numbers: Mapping[str, float]) -> str:
    words = [f"{label(name)} {number(value)}" for name, value in numbers.items()]
    return "\n".join([method.name, f"{setting.label} · {seeds}", *words])


# --- head to head --------------------------------------------------------------------------------------------------


def win_matrix(comparison: Comparison) -> Markup | None:
    """Draw how often the row beats the column, in the color of the one that wins more often.

    Args:
        comparison: Comparison to show.

    Returns:
        The map; ``None`` where no methods were judged against each other.
    """
    hue = hues(comparison)
    names = [method.name for method in comparison.methods]
    known = {(one.first, one.second): one for one in comparison.duels if one.estimate is not None}
    if not known:
        return None
    cells: list[list[Tile | None]] = []
    for row in names:
        cells.append([])
        for column in names:
            duel = known.get((row, column))
            if duel is None or duel.estimate is None:
                cells[-1].append(None)
                continue
            one = duel.estimate
            ends = "" if one.low is None or one.high is None else f"{number(one.low)} to {number(one.high)}"
            description = f"{row} against {column}\nwin rate {number(one.value)}" + (
                f"\n{comparison.bootstrap.confidence:.0%} interval {ends}\n{describe_p_value(duel.p)}" if ends else ""
            )
            shade = min(1.0, abs(one.value - 0.5) / 0.35)
            note = "" if duel.significant else "unclear"
            winner = row if one.value >= 0.5 else column
            cells[-1].append(Tile(f"{one.value:.2f}", description, shade, hue[winner], note=note))
    return tiles(names, names, cells, "wins", "against")
