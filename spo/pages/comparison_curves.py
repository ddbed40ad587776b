"""Curves of a comparison: the best setting of each method over the training step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from statistics import fmean
from typing import Any

from spo.comparison.compare import Comparison, Method
from spo.metrics.catalogue import INTERVAL_ENDS, comparable, label, title
from spo.pages.charts import LineChart, Series, line_chart
from spo.pages.comparison_figures import hues
from spo.pages.dashboard import Curves, Dashboard, unit_of
from spo.wording import clean, finite

# With fewer steps than this a validation curve is replaced by the training curve.
_CURVE_STEPS = 3

# Groups of drawn charts, and the points in them for the hover read-out.
Drawn = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def curves(comparison: Comparison, dashboard: Dashboard, without: Collection[str] = ()) -> Drawn:
    """Draw the curves of the best settings: the mean over seeds, in a band from the lowest seed to the highest.

    Methods share the axes of a metric that is comparable. Any other metric, such as a loss, has one chart per method.

    Args:
        comparison: Comparison to show.
        dashboard: Dashboard whose curves are drawn.
        without: Keys that are drawn elsewhere on the page.

    Returns:
        Groups of charts, and the points in them for the hover read-out.
    """
    sections = {
        section.title: [panel for spec in section.curves for panel in _panels(comparison, spec, without)]
        for section in dashboard.sections
    }
    return draw_groups(sections, comparison)


def draw_groups(groups: dict[str, list[LineChart]], comparison: Comparison) -> Drawn:
    """Draw line charts over the same steps, so that they can be read side by side.

    Args:
        groups: Charts of each group, by its title; empty groups are left out.
        comparison: Comparison whose steps they span.
    """
    runs = [run for method in comparison.methods for run in method.best.runs]
    steps = [step for run in runs for row in run.record.history if (step := finite(row.get("step"))) is not None]
    if not steps:
        return [], []
    span = (min(steps), max(steps))
    found, data = [], []
    for heading, panels in groups.items():
        charts = []
        for panel in panels:
            svg, points = line_chart(panel, span)
            charts.append({"panel": panel, "svg": svg})
            data.append(points)
        if charts:
            found.append({"title": heading, "charts": charts})
    return found, data


def _panels(comparison: Comparison, spec: Curves, without: Collection[str]) -> Iterator[LineChart]:
    """Make the charts of each metric: here methods share the axes, while in the report of a run metrics do."""
    for metric in spec.metrics:
        # A band over seeds stands for the ends of an interval.
        if metric.endswith(INTERVAL_ENDS):
            continue
        for key in (f"{split}/{metric}" for split in sorted(spec.splits, key=lambda split: split != "val")):
            series = [
                one
                for method in comparison.methods
                if key not in without and (one := series_of(comparison, method, key)) is not None
            ]
            enough = key.startswith("val/") and len(spec.splits) > 1
            if not series or (enough and max(len(one.steps) for one in series) < _CURVE_STEPS):
                continue
            if spec.varying and all(len(set(one.values)) == 1 for one in series):
                continue
            heading = spec.title
            if len(spec.metrics) > 1:
                known = label(metric) != metric
                heading = title(metric) if known else f"{heading}: {metric}"
            yield from _charts(key, heading, spec, series)
            break


def _charts(key: str, heading: str, spec: Curves, series: Sequence[Series]) -> Iterator[LineChart]:
    words = ", ".join(part for part in (unit_of(key), key.partition("/")[0]) if part)
    shared = comparable(key) or len(series) == 1
    for some in [series] if shared else [[one] for one in series]:
        name = heading if shared else f"{heading}, {some[0].name}"
        yield LineChart(clean(key), clean(name), words, list(some), spec.bounds, spec.baseline)


def series_of(comparison: Comparison, method: Method, key: str) -> Series | None:
    """Return the mean over seeds of a key at the steps that all seeds logged, with a band; ``None`` without a number.

    Args:
        comparison: Comparison, which decides the color.
        method: Method whose best setting is drawn.
        key: Key of ``history.jsonl``.
    """
    known = [dict(zip(*run.record.curve(key), strict=True)) for run in method.best.runs]
    steps = sorted(set.intersection(*(set(one) for one in known)))
    # A mean over those seeds alone that still have a number would leave out the ones that diverged.
    values = [[one[step] for one in known] for step in steps]
    if not any(math.isfinite(fmean(some)) for some in values):
        return None
    mean, low, high = (
        [f(some) if math.isfinite(fmean(some)) else math.nan for some in values] for f in (fmean, min, max)
    )
    banded = len(known) > 1
    return Series(
        method.name,
        steps,
        mean,
        hue=hues(comparison)[method.name],
        low=low if banded else (),
        high=high if banded else (),
    )
