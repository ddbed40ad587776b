"""Histograms, and values with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from spo.pages.charts.axes import BOTTOM, LEFT, RIGHT, TOP, draw_x_axis, draw_y_axis, nice_ticks, padded
from spo.pages.charts.svg import marker, svg
from spo.wording import number


def histogram(policy: Sequence[float], reference: Sequence[float], axis: str) -> Markup:
    """Draw two distributions over the same bins: the policy filled, the reference as an outline.

    Args:
        policy: Values of the policy, at least one.
        reference: Values of the reference; may be empty.
        axis: Name of the horizontal axis.
    """
    edges = bin_edges([*policy, *reference])
    shares = [_shares(values, edges) for values in (policy, reference)]
    top = max(max(one, default=0.0) for one in shares) * 1.08
    width, height = 560, 250

    def x(value: float) -> float:
        return LEFT + (value - edges[0]) / (edges[-1] - edges[0]) * (width - LEFT - RIGHT)

    def y(share: float) -> float:
        return height - BOTTOM - share / top * (height - TOP - BOTTOM)

    ticks = nice_ticks(edges[0], edges[-1], 8)
    parts = [
        draw_y_axis(nice_ticks(0, top, 5), y, width=width, percent=True),
        draw_x_axis(ticks, x, axis, width=width, height=height),
    ]
    for index, share in enumerate(shares[0]):
        left, right = x(edges[index]), x(edges[index + 1])
        span = f"{number(edges[index])} to {number(edges[index + 1])}"
        both = f"policy {share:.1%}" + (f", reference {shares[1][index]:.1%}" if reference else "")
        parts.append(
            f'<g><rect class="hit" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
            f'height="{height - TOP - BOTTOM}"/><rect class="bar hue-1" x="{left + 0.5:.1f}" y="{y(share):.1f}" '
            f'width="{max(right - left - 1, 0.5):.1f}" height="{y(0) - y(share):.1f}"/>'
            f"<title>{escape(span)}: {both}</title></g>"
        )
    if reference:
        outline = f"M{x(edges[0]):.1f},{y(0):.1f}" + "".join(
            f"V{y(share):.1f}H{x(edges[index + 1]):.1f}" for index, share in enumerate(shares[1])
        )
        parts.append(f'<path class="outline" d="{outline}V{y(0):.1f}"/>')
    for values, name in ((policy, "hue-1"), (reference, "outline")):
        if values:
            mean = x(sum(values) / len(values))
            parts.append(f'<path class="mean {name}" d="M{mean:.1f},{TOP}V{height - BOTTOM}"/>')
    return svg(parts, f"Distribution of {axis}", 'class="histogram"', width, height)


def bin_edges(values: Sequence[float]) -> list[float]:
    """Return the edges of 6 to 32 equal bins over all values, by the Freedman-Diaconis rule."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        half = max(abs(low) * 0.05, 0.5)
        low, high = low - half, high + half
    quarter = ordered[(3 * len(ordered)) // 4] - ordered[len(ordered) // 4]
    size = 2 * quarter / len(ordered) ** (1 / 3)
    count = 12 if size <= 0 else min(max(math.ceil((high - low) / size), 6), 32)
    return [low + (high - low) * index / count for index in range(count)] + [high]


def _shares(values: Sequence[float], edges: Sequence[float]) -> list[float]:
    counts = [0] * (len(edges) - 1)
    for value in values:
        place = int((value - edges[0]) / (edges[-1] - edges[0]) * len(counts))
        counts[min(max(place, 0), len(counts) - 1)] += 1
    return [count / len(values) for count in counts] if values else []


def interval_bar(value: float, low: float | None, high: float | None) -> Markup:
    """Draw a share in [0, 1] with its interval, and a line at 0.5, where neither side is better."""
    width, height, middle = 560, 76, 26

    def x(share: float) -> float:
        return 14 + share * (width - 28)

    parts = [f'<line class="axis" x1="{x(0)}" x2="{x(1)}" y1="{middle}" y2="{middle}"/>']
    parts += [
        f'<line class="axis" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{middle - 3}" y2="{middle + 3}"/>'
        f'<text class="tick" text-anchor="middle" x="{x(t):.1f}" y="{middle + 30}">{t:g}</text>'
        for t in (0, 0.25, 0.5, 0.75, 1)
    ]
    parts.append(f'<line class="baseline" x1="{x(0.5)}" x2="{x(0.5)}" y1="4" y2="{middle + 18}"/>')
    if low is not None and high is not None:
        parts.append(
            f'<rect class="interval hue-1" x="{x(low):.1f}" y="{middle - 7}" rx="2" '
            f'width="{max(x(high) - x(low), 1):.1f}" height="14"/>'
        )
    parts.append(f'<circle class="dot point hue-1" cx="{x(value):.1f}" cy="{middle}" r="5.5"/>')
    parts.append(f'<text class="tick" x="{x(0)}" y="{height - 2}">reference better</text>')
    parts.append(f'<text class="tick" text-anchor="end" x="{x(1)}" y="{height - 2}">policy better</text>')
    description = f"win rate {number(value)}" + (
        "" if low is None or high is None else f", 95% {number(low)} to {number(high)}"
    )
    return svg(parts, description, 'class="interval-bar"', width, height)


@dataclass(frozen=True)
class Whisker:
    """A value with its interval.

    Attributes:
        name: Label of the row.
        hue: Number of its color and shape.
        value: Value to mark.
        low: Lower end of its interval, if there is one.
        high: Upper end of its interval.
        description: Text under the pointer.
    """

    name: str
    hue: int
    value: float
    low: float | None
    high: float | None
    description: str


def whiskers(
    rows: Sequence[Whisker],
    axis: str,
    bounds: tuple[float, float] | None,
    baseline: float | None,
    *,
    compact: bool = False,
) -> Markup:
    """Draw values with their intervals below each other.

    Args:
        rows: Values from top to bottom, at least one.
        axis: Name of the horizontal axis.
        bounds: Range of the axis; ``None`` for one that fits.
        baseline: Position of a thin line to compare with.
        compact: Whether rows are drawn small, for many rows of one color.
    """
    width, row, names, numbers = (400, 27, 112, 58) if compact else (560, 54, 120, 78)
    before, letter = (0, 6.6) if compact else (22, 8.6)
    # Long names take up to half of the width from the axis.
    names = min(max(names, before + math.ceil(letter * max(len(one.name) for one in rows)) + 12), width // 2)
    room = int((names - before - 12) / letter)
    height = row * len(rows) + BOTTOM + 4
    ends = [v for one in rows for v in (one.value, one.low, one.high) if v is not None]
    low, high = bounds or padded(min(ends), max(ends))

    def x(value: float) -> float:
        return names + (value - low) / (high - low) * (width - names - numbers)

    ticks = [0, 0.25, 0.5, 0.75, 1] if (low, high) == (0, 1) else nice_ticks(low, high, 4 if compact else 6)
    base = row * len(rows)
    parts = [
        f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="4" y2="{base}"/>'
        f'<text class="tick" text-anchor="middle" x="{x(t):.1f}" y="{base + 16}">{t:g}</text>'
        for t in ticks
    ]
    if baseline is not None and low <= baseline <= high:
        parts.append(
            f'<line class="baseline strong" x1="{x(baseline):.1f}" x2="{x(baseline):.1f}" y1="0" y2="{base}"/>'
        )
    for place, one in enumerate(rows):
        y = row * place + row / 2
        inner = "" if compact else marker(one.hue, 8, y, 5)
        inner += f'<text class="row-name" x="{before}" y="{y + 5:.1f}">{escape(_cut(one.name, room))}</text>'
        if one.low is not None and one.high is not None:
            inner += (
                f'<rect class="interval hue-{one.hue}" x="{x(one.low):.1f}" y="{y - 7:.1f}" rx="3" '
                f'width="{max(x(one.high) - x(one.low), 1):.1f}" height="14"/>'
            )
        inner += marker(one.hue, x(one.value), y, 6, "point")
        inner += f'<text class="row-value" text-anchor="end" x="{width}" y="{y + 6:.1f}">{number(one.value)}</text>'
        hit = f'<rect class="hit" x="0" y="{row * place}" width="{width}" height="{row}"/>'
        parts.append(f'<g class="described">{hit}{inner}<title>{escape(one.description)}</title></g>')
    middle = (names + width - numbers) / 2
    parts.append(
        f'<text class="axis-name" text-anchor="middle" x="{middle:.0f}" y="{height - 4}">{escape(axis)}</text>'
    )
    return svg(parts, "; ".join(one.description for one in rows), 'class="whiskers"', width, height)


def _cut(text: str, room: int) -> str:
    """Shorten a name in its middle, since both ends tell names apart."""
    if len(text) <= room:
        return text
    end = (room - 1) // 2
    return f"{text[: room - 1 - end]}…{text[len(text) - end :]}"


@dataclass(frozen=True)
class Amount:
    """A row of a bar chart.

    Attributes:
        name: Label of the row.
        value: Share, from 0 to 1.
        mark: Value of a thin line across the bar, to compare with.
        description: Text under the pointer.
        faint: Whether the bar is drawn weakly.
    """

    name: str
    value: float
    mark: float
    description: str
    faint: bool = False


def amounts(rows: Sequence[Amount], hue: int, axis: str) -> Markup:
    """Draw shares as bars from zero, with their numbers. A mark beyond 1 is drawn at the end of the axis.

    Args:
        rows: Shares from top to bottom, at least one of them positive.
        hue: Number of the color of the bars.
        axis: Name of the horizontal axis.
    """
    width, row, numbers = 460, 27, 58
    names = min(max(96, math.ceil(6.6 * max(len(one.name) for one in rows)) + 12), width // 2)
    top = 1.04 * max(max(one.value, min(one.mark, 1.0)) for one in rows)
    base = row * len(rows)

    def x(value: float) -> float:
        return names + min(value / top, 1.0) * (width - names - numbers)

    ticks = nice_ticks(0, top, 4)
    parts = [
        f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="4" y2="{base}"/>'
        f'<text class="tick" text-anchor="middle" x="{x(t):.1f}" y="{base + 16}">{t:g}</text>'
        for t in ticks
    ]
    for place, one in enumerate(rows):
        y = row * place
        name = escape(_cut(one.name, int((names - 12) / 6.6)))
        inner = (
            f'<rect class="hit" x="0" y="{y}" width="{width}" height="{row}"/>'
            f'<text class="row-name" x="0" y="{y + row / 2 + 4:.1f}">{name}</text>'
            f'<rect class="amount hue-{hue}{" faint" if one.faint else ""}" x="{names}" y="{y + 7}" rx="2" '
            f'width="{x(one.value) - names:.1f}" height="{row - 14}"/>'
            f'<line class="of-chance" x1="{x(one.mark):.1f}" x2="{x(one.mark):.1f}" y1="{y + 3}" y2="{y + row - 3}"/>'
            f'<text class="row-value" text-anchor="end" x="{width}" y="{y + row / 2 + 4:.1f}">{one.value:.2f}</text>'
        )
        parts.append(f'<g class="described">{inner}<title>{escape(one.description)}</title></g>')
    middle, height = (names + width - numbers) / 2, base + BOTTOM + 2
    parts.append(
        f'<text class="axis-name" text-anchor="middle" x="{middle:.0f}" y="{height - 4}">{escape(axis)}</text>'
    )
    return svg(parts, "; ".join(one.description for one in rows), 'class="amounts"', width, height)
