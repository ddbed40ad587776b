"""Charts over a few rounds: each value has its interval, and values of one quantity are joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from spo.metrics.rounds import Measured
from spo.pages.charts.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    draw_x_axis,
    draw_y_axis,
    nice_ticks,
    padded,
)
from spo.pages.charts.svg import marker, svg
from spo.wording import number

# Series of one chart stand this far apart, as a share of the distance between rounds, so that each interval is seen.
_SHIFT = 0.07
_MOST_TICKS = 12


@dataclass(frozen=True)
class RoundSeries:
    """Values of one quantity over rounds.

    Attributes:
        name: Name in the legend.
        hue: Number of its color and shape, from 1.
        values: Value of each round by its number, in the order of the rounds. A line joins neighboring rounds.
    """

    name: str
    hue: int
    values: Mapping[int, Measured]


def rounds_chart(
    title: str,
    series: Sequence[RoundSeries],
    rounds: int,
    *,
    baseline: float | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> Markup:
    """Draw quantities over rounds.

    Args:
        title: Name of the vertical axis, for screen readers.
        series: Quantities, with at least one value in all.
        rounds: Number of the last round on the axis, which starts at round 0.
        baseline: Height of a thin line to compare with.
        width: Width of the view box.
        height: Height of the view box.
    """
    heights = [] if baseline is None else [baseline]
    for one in series:
        heights += [v for found in one.values.values() for v in (found.value, found.low, found.high) if v is not None]
    low, high = padded(min(heights), max(heights))
    last = max(rounds, 1)

    def x(place: float) -> float:
        room = 0.25
        return LEFT + (place + room) / (last + 2 * room) * (width - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - BOTTOM - (value - low) / (high - low) * (height - TOP - BOTTOM)

    every = 1 + last // _MOST_TICKS
    parts = [
        draw_y_axis(nice_ticks(low, high, round(height / 40)), y, width=width),
        draw_x_axis([float(one) for one in range(0, last + 1, every)], x, "round", width=width, height=height),
    ]
    if baseline is not None:
        at = y(baseline)
        parts.append(f'<line class="baseline" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
    for place, one in enumerate(series):
        shift = _SHIFT * (place - (len(series) - 1) / 2)
        points = {of_round: (x(of_round + shift), y(found.value)) for of_round, found in one.values.items()}
        parts.append(_line(one.hue, points))
        for of_round, found in one.values.items():
            at, top = points[of_round]
            whisker, words = "", f"round {of_round}\n{one.name} {number(found.value)}"
            if found.low is not None and found.high is not None:
                whisker = f'<path class="whisker hue-{one.hue}" d="M{at:.1f},{y(found.low):.1f}V{y(found.high):.1f}"/>'
                words += f"\n95% interval {number(found.low)} to {number(found.high)}"
            mark = marker(one.hue, at, top, 4.4, "point")
            parts.append(f'<g class="described">{whisker}{mark}<title>{escape(words)}</title></g>')
    described = "; ".join(f"{one.name}: {', '.join(number(v.value) for v in one.values.values())}" for one in series)
    return svg(parts, f"{title} by round: {described}", 'class="rounds"', width, height)


def _line(hue: int, points: Mapping[int, tuple[float, float]]) -> str:
    """Draw a line through the points of the rounds, with a gap where a round is missing."""
    path = "".join(f"{'L' if of_round - 1 in points else 'M'}{x:.1f},{y:.1f}" for of_round, (x, y) in points.items())
    return f'<path class="curve hue-{hue}" d="{path}"/>'
