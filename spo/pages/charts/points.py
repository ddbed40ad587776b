"""Scatter charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from spo.pages.charts.axes import (
    BOTTOM,
    LEFT,
    PLAIN,
    RIGHT,
    TOP,
    draw_x_axis,
    draw_y_axis,
    nice_ticks,
    padded,
    stretch_for,
    stretched_ticks,
)
from spo.pages.charts.svg import marker, svg


@dataclass(frozen=True)
class Point:
    """A point of a scatter chart.

    Attributes:
        x: Position on the horizontal axis.
        y: Position on the vertical axis.
        description: Text under the pointer.
        large: Whether it summarizes other points, as a mean does.
        ring: Whether a ring marks it as selected.
        start: Whether it is the start of a path, which is hollow and does not decide the scale of the axis: the KL of
            a start is zero.
    """

    x: float
    y: float
    description: str
    large: bool = False
    ring: bool = False
    start: bool = False


@dataclass(frozen=True)
class Cloud:
    """Points of one color and shape, and a line through some of them.

    Attributes:
        name: Name in the legend.
        hue: Number of the color and shape, from 1.
        points: Points of the cloud.
        line: Corners of the line; empty without a line.
    """

    name: str
    hue: int
    points: Sequence[Point]
    line: Sequence[tuple[float, float]] = ()


def scatter(
    clouds: Sequence[Cloud],
    x_axis: str,
    y_axis: str,
    start: tuple[float, float] | None = None,
    baseline: float | None = None,
    *,
    stretched: bool = False,
) -> Markup:
    """Draw points, and a line through some points of each cloud.

    Args:
        clouds: Clouds to draw, with at least one point in all.
        x_axis: Name of the horizontal axis.
        y_axis: Name of the vertical axis.
        start: Position of the reference model, drawn as a cross.
        baseline: Height of a thin line to compare with.
        stretched: Whether the horizontal axis may be logarithmic, where the points spread.
    """
    width, height = 520, 340
    stretch = stretch_for([p.x for cloud in clouds for p in cloud.points if not p.start]) if stretched else PLAIN
    places = [(p.x, p.y) for cloud in clouds for p in cloud.points] + ([start] if start else [])
    xs, ys = zip(*places, strict=True)
    (x0, x1), (y0, y1) = padded(*(stretch.place(end) for end in (min(xs), max(xs)))), padded(min(ys), max(ys))

    def x(value: float) -> float:
        return LEFT + (stretch.place(value) - x0) / (x1 - x0) * (width - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - BOTTOM - (value - y0) / (y1 - y0) * (height - TOP - BOTTOM)

    parts = [draw_y_axis(nice_ticks(y0, y1, 6), y, width=width)]
    even = stretch is PLAIN
    ticks = nice_ticks(x0, x1, 7) if even else stretched_ticks(min(xs), max(xs), x, gap=30)
    x_name = x_axis if even else f"{x_axis} ({stretch.name})"
    parts.append(draw_x_axis(ticks, x, x_name, width=width, height=height, even=even))
    if baseline is not None and y0 < baseline < y1:
        at = y(baseline)
        parts.append(f'<line class="baseline" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    for cloud in clouds:
        corners = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in cloud.line)
        parts.append(f'<polyline class="curve frontier hue-{cloud.hue}" points="{corners}"/>' if corners else "")
    for large in (False, True):
        for cloud in clouds:
            parts += [_point(cloud.hue, p, x(p.x), y(p.y)) for p in cloud.points if p.large is large]
    if start:
        a, b = x(start[0]), y(start[1])
        cross = f'<path class="outline" d="M{a - 5:.1f},{b:.1f}h10M{a:.1f},{b - 5:.1f}v10"/>'
        parts.append(f"<g>{cross}<title>the reference model</title></g>")
    return svg(parts, f"{y_axis} over {x_axis}", 'class="scatter"', width, height)


def _point(hue: int, point: Point, x: float, y: float) -> str:
    mark = marker(hue, x, y, 5.2 if point.large else 3.2, "hollow" if point.start else "" if point.large else "faint")
    ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="10"/>' if point.ring else ""
    return f'<g class="described">{ring}{mark}<title>{escape(point.description)}</title></g>'
