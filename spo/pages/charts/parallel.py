"""Settings of many keys: parallel coordinates, and a metric over one key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from spo.pages.charts.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, draw_y_axis, nice_ticks, padded
from spo.pages.charts.keys import KeyAxis
from spo.pages.charts.svg import marker, svg

RAMP_COLORS = 7
"""Number of colors of the sequential ramp, ``ramp-0`` for the worst to ``ramp-6`` for the best."""
_WIDTH, _TOP, _AXIS_HEIGHT, _SIDE = 1000, 44, 230, 74
_CHARACTER_WIDTH = 7.6


@dataclass(frozen=True)
class Tried:
    """A setting in a chart of settings.

    Attributes:
        values: Values of the keys, in the order of the axes.
        metric: Value of the metric; ``None`` where it is unknown.
        description: Text under the pointer.
        best: Whether it is the selected setting.
        ends: Lowest and highest value of the metric over seeds.
    """

    values: Sequence[Any]
    metric: float | None
    description: str
    best: bool = False
    ends: tuple[float, float] | None = None


def ramp(value: float, low: float, high: float, *, upward: bool = True) -> str:
    """Return the class of the color of a quantity; the better the value, the stronger the color.

    Args:
        value: Value to color.
        low: Smallest value of the chart.
        high: Largest value of the chart.
        upward: Whether more is better.
    """
    share = (value - low) / (high - low) if high > low else 0.5
    return f"ramp-{round((share if upward else 1 - share) * (RAMP_COLORS - 1))}"


def parallel(
    axes: Sequence[KeyAxis], metric: KeyAxis, settings: Sequence[Tried], hue: int, *, upward: bool = True
) -> Markup:
    """Draw each setting as a line through its values on parallel axes, colored by the metric on the last axis.

    Args:
        axes: Axes of the keys.
        metric: Axis of the metric.
        settings: Settings to draw; one without the metric ends before the last axis.
        hue: Number of the color of the method, for the selected setting.
        upward: Whether more of the metric is better.
    """
    every = [*axes, metric]
    space = (_WIDTH - 2 * _SIDE) / (len(every) - 1)
    low, high = metric.numbers[0], metric.numbers[-1]

    def y(place: float) -> float:
        return _TOP + (1 - place) * _AXIS_HEIGHT

    def corners(one: Tried) -> list[tuple[float, float]]:
        values = list(zip(axes, one.values, strict=True))
        values += [(metric, one.metric)] if one.metric is not None else []
        return [(_SIDE + index * space, y(axis.place(value))) for index, (axis, value) in enumerate(values)]

    parts = [_axis(axis, _SIDE + index * space, space, y) for index, axis in enumerate(every)]
    parts.append(_ramp_bar(metric, _WIDTH - _SIDE, y, upward))
    # The best lines are drawn last, on top of the others.
    sign = 1 if upward else -1
    order = sorted(settings, key=lambda one: (one.best, one.metric is not None, sign * (one.metric or 0.0)))
    for one in order:
        points = corners(one)
        look = "unknown" if one.metric is None else ramp(one.metric, low, high, upward=upward)
        look = f"selected hue-{hue}" if one.best else look
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        marks = "".join(marker(hue, a, b, 4.5, "point") for a, b in points) if one.best else ""
        parts.append(
            f'<g class="described"><polyline class="hit-line" points="{path}"/>'
            f'<polyline class="setting {look}" points="{path}"/>{marks}<title>{escape(one.description)}</title></g>'
        )
    parts += [_tick_texts(axis, _SIDE + index * space, y) for index, axis in enumerate(every)]
    names = ", ".join(axis.name for axis in axes)
    return svg(parts, f"{metric.name} by {names}", 'class="parallel"', _WIDTH, _TOP + _AXIS_HEIGHT + 14)


def _axis(axis: KeyAxis, x: float, space: float, y: Any) -> str:
    room = int(space / _CHARACTER_WIDTH) - (4 if axis.logarithmic else 0)
    name = axis.name if len(axis.name) <= room else "…" + axis.name[len(axis.name) - room + 1 :]
    scale = '<tspan class="scale"> log</tspan>' if axis.logarithmic else ""
    return (
        f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y(1):.1f}" y2="{y(0):.1f}"/>'
        f'<text class="key-name" text-anchor="middle" x="{x:.1f}" y="{_TOP - 18}">{escape(name)}{scale}'
        f"<title>{escape(axis.name)}</title></text>"
    )


def _ramp_bar(metric: KeyAxis, x: float, y: Any, upward: bool) -> str:
    """Draw the metric's axis in the colors of the lines, so that it explains them."""
    low, high = metric.place(metric.numbers[0]), metric.place(metric.numbers[-1])
    steps = [low + (high - low) * index / RAMP_COLORS for index in range(RAMP_COLORS + 1)]
    return "".join(
        f'<rect class="ramp-{index if upward else RAMP_COLORS - 1 - index}" x="{x - 4:.1f}" width="8" '
        f'y="{y(steps[index + 1]):.1f}" height="{y(steps[index]) - y(steps[index + 1]):.1f}"/>'
        for index in range(RAMP_COLORS)
    )


def _tick_texts(axis: KeyAxis, x: float, y: Any) -> str:
    return "".join(
        f'<line class="axis" x1="{x - 4:.1f}" x2="{x:.1f}" y1="{y(place):.1f}" y2="{y(place):.1f}"/>'
        f'<text class="tick on-lines" text-anchor="end" x="{x - 8:.1f}" y="{y(place) + 3.8:.1f}">{escape(text)}</text>'
        for place, text in axis.ticks(18 / _AXIS_HEIGHT)
    )


def over_key(axis: KeyAxis, place: int, metric: str, settings: Sequence[Tried], hue: int) -> Markup:
    """Draw a metric over the values of one key, one mark per setting with the range of its seeds.

    Args:
        axis: Axis of the key.
        place: Position of the key among the values of a setting.
        metric: Name of the metric on the vertical axis.
        settings: Settings; those without the metric are left out.
        hue: Number of the color and shape of the method.
    """
    known = [(one, one.metric) for one in settings if one.metric is not None]
    ends = [end for one, value in known for end in (value, *(one.ends or ()))]
    low, high = padded(min(ends), max(ends))

    def x(value: Any) -> float:
        return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    base = HEIGHT - BOTTOM
    parts = [draw_y_axis(nice_ticks(low, high), y)]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for share, text in axis.ticks(40 / (WIDTH - LEFT - RIGHT)):
        at = LEFT + share * (WIDTH - LEFT - RIGHT)
        parts.append(
            f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{base}" y2="{base + 4}"/>'
            f'<text class="tick" text-anchor="middle" x="{at:.1f}" y="{base + 16}">{escape(text)}</text>'
        )
    name = f"{axis.name} (logarithmic scale)" if axis.logarithmic else axis.name
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis-name" text-anchor="middle" x="{middle}" y="{HEIGHT - 5}">{escape(name)}</text>')
    for one, value in sorted(known, key=lambda pair: pair[0].best):
        a, b = x(one.values[place]), y(value)
        bar = ""
        if one.ends is not None and one.ends[1] > one.ends[0]:
            bar = f'<line class="of-seeds hue-{hue}" x1="{a:.1f}" x2="{a:.1f}" y1="{y(one.ends[0]):.1f}" '
            bar += f'y2="{y(one.ends[1]):.1f}"/>'
        ring = f'<circle class="ring" cx="{a:.1f}" cy="{b:.1f}" r="8.5"/>' if one.best else ""
        parts.append(
            f'<g class="described">{bar}{ring}{marker(hue, a, b, 4)}<title>{escape(one.description)}</title></g>'
        )
    return svg(parts, f"{metric} over {axis.name}", 'class="over-key"')
