"""Figures of a comparison: the main metric, frontiers, head to head, the settings that were tried, and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from spo.comparison.choice import Setting, better, pareto, short_key, value_order
from spo.comparison.compare import Comparison, Method
from spo.comparison.runs import Run
from spo.metrics.catalogue import SHARE, find, label, title, unit
from spo.pages.charts import Cloud, LineChart, Point, Series, Tile, Whisker, line_chart, scatter, tiles, whiskers
from spo.pages.comparison_words import describe_p_value
from spo.pages.dashboard import Dashboard, unit_of
from spo.wording import clean, number

HUES = 8
# With fewer steps than this a validation curve is replaced by the training curve.
_CURVE_STEPS = 3


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
    even = _even_share(metric)
    if even is not None:
        return whiskers(rows, _axis(metric), SHARE, even)
    return whiskers(rows, _axis(metric), None, comparison.reference.get(metric))


def _even_share(metric: str) -> float | None:
    """Return the share at which neither side is ahead, for a metric that is such a share."""
    entry = find(metric)
    return entry.neutral if entry is not None and entry.bounds == SHARE else None


def _axis(metric: str) -> str:
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
                x, y = _eval(run, cost), _eval(run, metric)
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
    return scatter(clouds, _axis(cost), _axis(metric), start, _even_share(metric), stretched=cost == "kl")


def _eval(run: Run, metric: str) -> float | None:
    return run.record.metric(f"eval/{metric}")


def _describe(method: Method, setting: Setting, seeds: str, numbers: Mapping[str, float]) -> str:
    words = [f"{label(name)} {number(value)}" for name, value in numbers.items()]
    return "\n".join([method.name, f"{setting.label} · {seeds}", *words])


# --- head to head --------------------------------------------------------------------------------------------------


def win_matrix(comparison: Comparison) -> Markup | None:
    """Draw how often the row beats the column; ``None`` where no methods were judged against each other."""
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
            cells[-1].append(Tile(f"{one.value:.2f}", description, shade, 1 if one.value >= 0.5 else 2, note=note))
    return tiles(names, names, cells, "wins", "against")


# --- settings ------------------------------------------------------------------------------------------------------


def settings_chart(comparison: Comparison, method: Method) -> Markup | None:
    """Draw the settings of a method by the metric that they were selected by: a map of two keys, or a list of one.

    Args:
        comparison: Comparison to show.
        method: Method of the settings.

    Returns:
        The chart; ``None`` for a single setting, or for more than two keys.
    """
    keys = list(dict.fromkeys(key for setting in method.settings for key in setting.values))
    if len(method.settings) < 2 or comparison.select is None:
        return None
    if len(keys) == 1:
        return _settings_list(comparison, method, keys[0])
    return _settings_map(comparison, method, keys) if len(keys) == 2 else None


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).rpartition(".")[2] or str(value)


def _settings_map(comparison: Comparison, method: Method, keys: Sequence[str]) -> Markup:
    across, down = keys
    columns, rows = (
        sorted({setting.values.get(key) for setting in method.settings}, key=value_order) for key in (across, down)
    )
    at = {(setting.values.get(down), setting.values.get(across)): setting for setting in method.settings}
    known = [setting.selection for setting in method.settings if setting.selection is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    up = better(comparison.select or "") is not False
    cells: list[list[Tile | None]] = []
    for row in rows:
        cells.append([])
        for column in columns:
            setting = at.get((row, column))
            if setting is None or setting.selection is None:
                cells[-1].append(None)
                continue
            share = (setting.selection - low) / (high - low) if high > low else 0.5
            cells[-1].append(
                Tile(
                    number(setting.selection),
                    _describe_setting(comparison, method, setting),
                    share if up else 1 - share,
                    hues(comparison)[method.name],
                    ring=setting is method.best,
                )
            )
    return tiles([_text(v) for v in rows], [_text(v) for v in columns], cells, short_key(down), short_key(across))


def _settings_list(comparison: Comparison, method: Method, key: str) -> Markup:
    rows = []
    for setting in sorted(method.settings, key=lambda one: value_order(one.values.get(key))):
        if setting.selection is None:
            continue
        of_seeds = [value for run in setting.runs if (value := run.number(comparison.select or "")) is not None]
        name = f"{short_key(key)} {_text(setting.values.get(key))}" + (" ✓" if setting is method.best else "")
        description, hue = _describe_setting(comparison, method, setting), hues(comparison)[method.name]
        rows.append(Whisker(name, hue, setting.selection, min(of_seeds), max(of_seeds), description))
    return whiskers(rows, f"{comparison.select}, from the lowest seed to the highest", None, None, compact=True)


def _describe_setting(comparison: Comparison, method: Method, setting: Setting) -> str:
    numbers = {}
    for name in dict.fromkeys((comparison.metric_name, "kl", "entropy")):
        seen = [value for run in setting.runs if (value := _eval(run, name)) is not None]
        if seen:
            numbers[name] = fmean(seen)
    chosen = "selected · " if setting is method.best else ""
    lines = [f"{label(name)} on the test split {number(value)}" for name, value in numbers.items()]
    selection = f"{comparison.select} {number(setting.selection)}"
    return "\n".join([method.name, f"{chosen}{setting.label} · {len(setting.runs)} seeds", selection, *lines])


# --- curves --------------------------------------------------------------------------------------------------------


def curves(comparison: Comparison, dashboard: Dashboard) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw the curves of the best settings: the mean over seeds, in a band from the lowest seed to the highest.

    Args:
        comparison: Comparison to show.
        dashboard: Dashboard whose curves are drawn.

    Returns:
        Groups of charts, and the points in them for the hover read-out.
    """
    runs = [run for method in comparison.methods for run in method.best.runs]
    steps = [step for run in runs for row in run.record.history if isinstance(step := row.get("step"), int | float)]
    if not steps:
        return [], []
    span = (float(min(steps)), float(max(steps)))
    groups, data = [], []
    for section in dashboard.sections:
        charts = []
        for panel in (one for spec in section.curves for one in _panels(comparison, spec)):
            svg, points = line_chart(panel, span)
            charts.append({"panel": panel, "svg": svg})
            data.append(points)
        if charts:
            groups.append({"title": section.title, "charts": charts})
    return groups, data


def _panels(comparison: Comparison, spec: Any) -> list[LineChart]:
    """Make one chart per metric: here methods share the axes, while in the report of a run metrics do."""
    panels = []
    for metric in spec.metrics:
        for key in (f"{split}/{metric}" for split in sorted(spec.splits, key=lambda split: split != "val")):
            series = [one for method in comparison.methods if (one := _series(comparison, method, key)) is not None]
            enough = key.startswith("val/") and len(spec.splits) > 1
            if not series or (enough and max(len(one.steps) for one in series) < _CURVE_STEPS):
                continue
            if spec.varying and all(len(set(one.values)) == 1 for one in series):
                continue
            heading = spec.title
            if len(spec.metrics) > 1:
                known = label(metric) != metric
                heading = title(metric) if known else f"{heading}: {metric}"
            words = ", ".join(part for part in (unit_of(key), key.partition("/")[0]) if part)
            panels.append(LineChart(clean(key), clean(heading), words, series, spec.bounds, spec.baseline))
            break
    return panels


def _series(comparison: Comparison, method: Method, key: str) -> Series | None:
    known = [dict(zip(*run.record.curve(key), strict=True)) for run in method.best.runs]
    steps = sorted(set.intersection(*(set(one) for one in known)))
    values = [[one[step] for one in known if not math.isnan(one[step])] for step in steps]
    if not any(values):
        return None
    mean, low, high = ([f(some) if some else math.nan for some in values] for f in (fmean, min, max))
    banded = len(known) > 1
    return Series(
        method.name,
        steps,
        mean,
        hue=hues(comparison)[method.name],
        low=low if banded else (),
        high=high if banded else (),
    )
