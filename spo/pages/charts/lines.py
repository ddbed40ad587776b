"""Line charts over the training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from spo.pages.charts.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    draw_x_axis,
    draw_y_axis,
    nice_ticks,
    padded,
)
from spo.pages.charts.svg import svg
from spo.wording import number

MAX_POINTS = 500
# A series of more points than this is a line without dots.
_MAX_DOTS = 40


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: Name in the legend.
        steps: Increasing positions on the horizontal axis.
        values: One value for each step; NaN leaves a gap.
        hue: Number of its color, from 1.
        dashed: Whether it is drawn dashed and dotted, as validation is.
        low: Lower ends of a band around it, one for each step; empty without a band.
        high: Upper ends of the band.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    hue: int = 1
    dashed: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class LineChart:
    """A line chart of a few series over the training step.

    Attributes:
        key: Keys of the metrics in the chart.
        title: Heading of the chart.
        unit: Unit of the vertical axis, empty for a pure number.
        series: Lines of the chart.
        bounds: Fixed range of the vertical axis, such as (0, 1) for a share; ``None`` for one that fits.
        baseline: Height of a thin line to compare with, such as 0.5 for an accuracy.
    """

    key: str
    title: str
    unit: str
    series: list[Series] = field(default_factory=list)
    bounds: tuple[float, float] | None = None
    baseline: float | None = None


def thin(steps: Sequence[float], values: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Keep at most ``limit`` points: the first, the last, and the lowest and highest of equal stretches.

    Every point that is left is one of the given points, so spikes survive and nothing is averaged.
    """
    if len(steps) <= limit:
        return list(steps), list(values)
    kept, buckets = {0, len(steps) - 1}, max(1, (limit - 2) // 3)
    for bucket in range(buckets):
        stretch = range(bucket * len(steps) // buckets, (bucket + 1) * len(steps) // buckets)
        numbers = [index for index in stretch if not math.isnan(values[index])]
        kept.update(list(stretch[:1]) if not numbers else ())
        kept.update(index for index in stretch if math.isnan(values[index]) and index == stretch[len(stretch) // 2])
        if numbers:
            kept |= {min(numbers, key=lambda i: values[i]), max(numbers, key=lambda i: values[i])}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def line_chart(chart: LineChart, span: tuple[float, float]) -> tuple[Markup, dict[str, Any]]:
    """Draw a line chart.

    Args:
        chart: Chart to draw; each series is thinned to at most ``MAX_POINTS`` points.
        span: First and last step, the same for all charts of a page so that they can be read side by side.

    Returns:
        The SVG, and the data of the hover read-out: plot area, span and the points drawn.
    """
    series = [(one, *thin(one.steps, one.values)) for one in chart.series]
    bands = [v for one in chart.series for v in (*one.low, *one.high)]
    numbers = [v for v in (*bands, *(v for _, _, values in series for v in values)) if not math.isnan(v)]
    low, high = chart.bounds or padded(min(numbers, default=0.0), max(numbers, default=1.0))
    x0, x1 = span if span[1] > span[0] else (span[0] - 0.5, span[0] + 0.5)

    def x(step: float) -> float:
        return LEFT + (step - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    steps = [s for s in nice_ticks(*span, 6) if s.is_integer()] or [span[0]]
    parts = [draw_y_axis(nice_ticks(low, high), y), draw_x_axis(steps, x, "step")]
    if chart.baseline is not None and low < chart.baseline < high:
        height = y(chart.baseline)
        parts.append(f'<line class="baseline" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
    parts += [_band(one, x, y) for one in chart.series if one.low]
    for one, at, values in series:
        look = " dashed" if one.dashed else " noisy" if len(at) > _MAX_DOTS else ""
        parts.append(f'<path class="curve hue-{one.hue}{look}" d="{_path(at, values, x, y)}"/>')
        dots = [
            (s, v)
            for s, v, alone in zip(at, values, _alone(values), strict=True)
            if not math.isnan(v) and (alone or (one.dashed and len(at) <= _MAX_DOTS))
        ]
        parts += [f'<circle class="dot hue-{one.hue}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.4"/>' for s, v in dots]
    parts.append(f'<line class="crosshair" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>')
    data = {
        "key": chart.key,
        "span": [x0, x1],
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "width": WIDTH,
        "series": [
            {"name": one.name, "hue": one.hue, "dashed": one.dashed, "steps": at, "values": [_short(v) for v in values]}
            for one, at, values in series
        ],
    }
    description = "; ".join(_description(one) for one in chart.series)
    return svg(parts, f"{chart.title}: {description}", f'class="chart" data-chart="{escape(chart.key)}"'), data


def _path(steps: Sequence[float], values: Sequence[float], x: Scale, y: Scale) -> str:
    pen_up, parts = True, []
    for step, value in zip(steps, values, strict=True):
        if math.isnan(value):
            pen_up = True
            continue
        parts.append(f"{'M' if pen_up else 'L'}{x(step):.1f},{y(value):.1f}")
        pen_up = False
    return "".join(parts)


def _band(series: Series, x: Scale, y: Scale) -> str:
    known = [
        (at, bottom, top)
        for at, bottom, top in zip(series.steps, series.low, series.high, strict=True)
        if not math.isnan(bottom + top)
    ]
    every = max(1, len(known) // MAX_POINTS)
    known = [one for place, one in enumerate(known) if place % every == 0 or place == len(known) - 1]
    edge = [f"{x(at):.1f},{y(top):.1f}" for at, _, top in known]
    edge += [f"{x(at):.1f},{y(bottom):.1f}" for at, bottom, _ in reversed(known)]
    return f'<polygon class="band hue-{series.hue}" points="{" ".join(edge)}"/>'


def _alone(values: Sequence[float]) -> list[bool]:
    gap = [True, *(math.isnan(v) for v in values), True]
    return [before and after for before, after in zip(gap, gap[2:], strict=False)]


def _description(series: Series) -> str:
    numbers = [v for v in series.values if not math.isnan(v)]
    if not numbers:
        return f"{series.name}: no finite value"
    return f"{series.name} from {number(numbers[0])} to {number(numbers[-1])}"


def _short(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.7g}")
