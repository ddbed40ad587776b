"""Charts as inline SVG, drawn in Python so that a page shows them without a script and prints them as they are.

Colours are class names (``hue-1`` ...) that the page's style sheet defines for light and dark; a validation series is
also dashed and dotted, so that no chart is read by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from spo.wording import number

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36
MAX_POINTS = 500
_MARKED = 40  # a series of more points than this is a line without dots


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: What the legend calls it.
        steps: Increasing positions on the horizontal axis.
        values: One value for each step; NaN leaves a gap.
        hue: Number of its colour, from 1.
        dashed: Whether it is drawn dashed and dotted, as validation is.
        low: Lower ends of a band around it, one for each step; none where it has no band.
        high: Upper ends.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    hue: int = 1
    dashed: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Point:
    """A point of a scatter chart.

    Attributes:
        x: Where it lies.
        y: Where it lies.
        said: What it is, in words.
        large: Whether it stands for others, as a mean does.
        ring: Whether it is marked as the chosen one.
    """

    x: float
    y: float
    said: str
    large: bool = False
    ring: bool = False


@dataclass(frozen=True)
class Cloud:
    """Points of one colour and shape, and a line through some.

    Attributes:
        name: What the legend calls them.
        hue: Number of their colour and shape, from 1.
        points: The points.
        line: Corners of the line.
    """

    name: str
    hue: int
    points: Sequence[Point]
    line: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Whisker:
    """A value with its interval.

    Attributes:
        name: What it is of.
        hue: Number of its colour and shape.
        value: The value.
        low: Lower end of its interval, if there is one.
        high: Upper end.
        said: What it says, in words.
    """

    name: str
    hue: int
    value: float
    low: float | None
    high: float | None
    said: str


@dataclass(frozen=True)
class Tile:
    """A cell of a map.

    Attributes:
        text: What is written on it.
        said: What it says, in words.
        shade: How strong its colour is, from 0 to 1.
        hue: Number of its colour.
        ring: Whether it is marked as the chosen one.
        note: A second, smaller line.
    """

    text: str
    said: str
    shade: float
    hue: int = 1
    ring: bool = False
    note: str = ""


@dataclass(frozen=True)
class Panel:
    """A line chart of a few series over the training step.

    Attributes:
        key: The metrics it shows.
        title: Its heading.
        unit: Unit of the vertical axis, empty for a pure number.
        series: The lines.
        bounds: Fixed range of the vertical axis where it has one, such as (0, 1) for a share.
        baseline: Height of a thin line to compare with, such as 0.5 for an accuracy.
    """

    key: str
    title: str
    unit: str
    series: list[Series] = field(default_factory=list)
    bounds: tuple[float, float] | None = None
    baseline: float | None = None


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about ``count`` round numbers that lie in [low, high], in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """Writes a tick with as many decimals as the distance between ticks asks for, and thousands as k and M."""
    if value == 0:
        return "0"
    sizes = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"), (0.0, 1.0, ""))
    size, suffix = next((size, suffix) for start, size, suffix in sizes if abs(value) >= start)
    value, step = value / size, step / size
    if 0 < step < 5e-5 or abs(value) >= 1e12:
        digits = max(0, math.floor(math.log10(abs(value))) - math.floor(math.log10(step) + 1e-9)) if step > 0 else 1
        mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    decimals = min(max(0, -math.floor(math.log10(step) + 1e-9)), 8) if step > 0 else 3
    return f"{value:.{decimals}f}{suffix}".replace("-", "−")


def thin(steps: Sequence[float], values: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Keeps at most ``limit`` of the points: the first, the last, and the lowest and highest of equal stretches.

    Every kept point is one of the given points, so a spike survives and nothing is averaged.
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


def line_chart(panel: Panel, span: tuple[float, float]) -> tuple[Markup, dict[str, Any]]:
    """Draws a panel.

    Args:
        panel: What to draw; each series is thinned to at most ``MAX_POINTS`` points.
        span: First and last step, the same for all charts of a page so that they can be read side by side.

    Returns:
        The SVG, and what the hover read-out needs: plot area, span and the points drawn.
    """
    series = [(one, *thin(one.steps, one.values)) for one in panel.series]
    bands = [v for one in panel.series for v in (*one.low, *one.high)]
    numbers = [v for v in (*bands, *(v for _, _, values in series for v in values)) if not math.isnan(v)]
    low, high = panel.bounds or _padded(min(numbers, default=0.0), max(numbers, default=1.0))
    x0, x1 = span if span[1] > span[0] else (span[0] - 0.5, span[0] + 0.5)

    def x(step: float) -> float:
        return LEFT + (step - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    steps = [s for s in nice_ticks(*span, 6) if s.is_integer()] or [span[0]]
    parts = [_y_axis(nice_ticks(low, high), y), _x_axis(steps, x, "step")]
    if panel.baseline is not None and low < panel.baseline < high:
        height = y(panel.baseline)
        parts.append(f'<line class="baseline" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
    parts += [_band(one, x, y) for one in panel.series if one.low]
    for one, at, values in series:
        look = " dashed" if one.dashed else " noisy" if len(at) > _MARKED else ""
        parts.append(f'<path class="curve hue-{one.hue}{look}" d="{_path(at, values, x, y)}"/>')
        dots = [
            (s, v)
            for s, v, alone in zip(at, values, _alone(values), strict=True)
            if not math.isnan(v) and (alone or (one.dashed and len(at) <= _MARKED))
        ]
        parts += [f'<circle class="dot hue-{one.hue}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.4"/>' for s, v in dots]
    parts.append(f'<line class="crosshair" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>')
    data = {
        "key": panel.key,
        "span": [x0, x1],
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "width": WIDTH,
        "series": [
            {"name": one.name, "hue": one.hue, "dashed": one.dashed, "steps": at, "values": [_short(v) for v in values]}
            for one, at, values in series
        ],
    }
    said = "; ".join(_said(one) for one in panel.series)
    return _svg(parts, f"{panel.title}: {said}", f'class="chart" data-chart="{escape(panel.key)}"'), data


def histogram(policy: Sequence[float], reference: Sequence[float], axis: str) -> Markup:
    """Draws two distributions over the same bins: the policy's filled, the reference's as an outline.

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
        _y_axis(nice_ticks(0, top, 5), y, width=width, percent=True),
        _x_axis(ticks, x, axis, width=width, height=height),
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
    return _svg(parts, f"Distribution of {axis}", 'class="histogram"', width, height)


def interval_bar(value: float, low: float | None, high: float | None) -> Markup:
    """Draws a share in [0, 1] with its interval against the line of no difference at 0.5."""
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
    said = f"win rate {number(value)}" + (
        "" if low is None or high is None else f", 95% {number(low)} to {number(high)}"
    )
    return _svg(parts, said, 'class="interval-bar"', width, height)


def marker(hue: int, x: float, y: float, size: float, look: str = "") -> str:
    """Draws a mark whose shape belongs to its colour, so that neither is needed to tell marks apart.

    Args:
        hue: Number of its colour and shape, from 1.
        x: Its middle.
        y: Its middle.
        size: Half of its height.
        look: Further class names.
    """
    shapes = (
        "M1,0A1,1 0 1 1 -1,0A1,1 0 1 1 1,0Z",
        "M-.9,-.9H.9V.9H-.9Z",
        "M0,-1.15L1.1,.85H-1.1Z",
        "M0,-1.25L1.1,0L0,1.25L-1.1,0Z",
        "M0,1.15L1.1,-.85H-1.1Z",
        "M-.35,-1.1H.35V-.35H1.1V.35H.35V1.1H-.35V.35H-1.1V-.35H-.35Z",
        "M-1.1,-.55H1.1V.55H-1.1Z",
        "M-.55,-1.1H.55V1.1H-.55Z",
    )
    shape = shapes[(hue - 1) % len(shapes)]
    return f'<path class="mark hue-{hue} {look}" transform="translate({x:.1f} {y:.1f}) scale({size:g})" d="{shape}"/>'


def scatter(
    clouds: Sequence[Cloud],
    x_axis: str,
    y_axis: str,
    start: tuple[float, float] | None = None,
    baseline: float | None = None,
) -> Markup:
    """Draws points, and a line through those that were chosen for it.

    Args:
        clouds: What to draw, at least one point in all.
        x_axis: Name of the horizontal axis.
        y_axis: Name of the vertical axis.
        start: Where everything started from, drawn as a cross.
        baseline: Height of a thin line to compare with.
    """
    width, height = 520, 340
    places = [(p.x, p.y) for cloud in clouds for p in cloud.points] + ([start] if start else [])
    (x0, x1), (y0, y1) = (_padded(min(some), max(some)) for some in zip(*places, strict=True))

    def x(value: float) -> float:
        return LEFT + (value - x0) / (x1 - x0) * (width - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - BOTTOM - (value - y0) / (y1 - y0) * (height - TOP - BOTTOM)

    parts = [_y_axis(nice_ticks(y0, y1, 6), y, width=width)]
    parts.append(_x_axis(nice_ticks(x0, x1, 7), x, x_axis, width=width, height=height))
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
    return _svg(parts, f"{y_axis} over {x_axis}", 'class="scatter"', width, height)


def _point(hue: int, point: Point, x: float, y: float) -> str:
    mark = marker(hue, x, y, 5.2 if point.large else 3.2, "" if point.large else "faint")
    ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="10"/>' if point.ring else ""
    return f'<g class="said">{ring}{mark}<title>{escape(point.said)}</title></g>'


def whiskers(
    rows: Sequence[Whisker],
    axis: str,
    bounds: tuple[float, float] | None,
    baseline: float | None,
    *,
    compact: bool = False,
) -> Markup:
    """Draws values with their intervals below each other.

    Args:
        rows: From top to bottom, at least one.
        axis: Name of the horizontal axis.
        bounds: Its range; ``None`` for one that fits.
        baseline: Where a thin line is drawn to compare with.
        compact: Whether there are many rows of one colour.
    """
    width, row, names = (400, 27, 112) if compact else (560, 54, 120)
    height = row * len(rows) + BOTTOM + 4
    ends = [v for one in rows for v in (one.value, one.low, one.high) if v is not None]
    low, high = bounds or _padded(min(ends), max(ends))

    def x(value: float) -> float:
        return names + (value - low) / (high - low) * (width - names - 58)

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
        inner += f'<text class="row-name" x="{0 if compact else 22}" y="{y + 5:.1f}">{escape(one.name)}</text>'
        if one.low is not None and one.high is not None:
            inner += (
                f'<rect class="interval hue-{one.hue}" x="{x(one.low):.1f}" y="{y - 7:.1f}" rx="3" '
                f'width="{max(x(one.high) - x(one.low), 1):.1f}" height="14"/>'
            )
        inner += marker(one.hue, x(one.value), y, 6, "point")
        inner += f'<text class="row-value" text-anchor="end" x="{width}" y="{y + 6:.1f}">{number(one.value)}</text>'
        hit = f'<rect class="hit" x="0" y="{row * place}" width="{width}" height="{row}"/>'
        parts.append(f'<g class="said">{hit}{inner}<title>{escape(one.said)}</title></g>')
    middle = (names + width - 58) / 2
    parts.append(
        f'<text class="axis-name" text-anchor="middle" x="{middle:.0f}" y="{height - 4}">{escape(axis)}</text>'
    )
    return _svg(parts, "; ".join(one.said for one in rows), 'class="whiskers"', width, height)


def tiles(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Tile | None]], row_axis: str, column_axis: str
) -> Markup:
    """Draws a map of cells, coloured by what they are worth.

    Args:
        rows: Names of the rows.
        columns: Names of the columns.
        cells: One sequence per row; ``None`` leaves a hole.
        row_axis: What the rows are.
        column_axis: What the columns are.
    """
    side, tall, top = 78, 50, 44
    left = 34 + max(7.2 * max(map(len, rows)), 12)
    width, height = left + side * len(columns) + 4, top + tall * len(rows) + 6
    parts = [f'<text class="axis-name" x="{left:.0f}" y="12">{escape(column_axis)} →</text>']
    parts.append(f'<text class="axis-name" x="0" y="{top - 10}">{escape(row_axis)} ↓</text>')
    for place, name in enumerate(columns):
        middle = left + side * (place + 0.5)
        parts.append(f'<text class="tick" text-anchor="middle" x="{middle:.1f}" y="{top - 10}">{escape(name)}</text>')
    for i, name in enumerate(rows):
        y = top + tall * i
        parts.append(
            f'<text class="tick" text-anchor="end" x="{left - 9:.1f}" y="{y + tall / 2 + 4}">{escape(name)}</text>'
        )
        for j, cell in enumerate(cells[i]):
            parts.append("" if cell is None else _tile(cell, left + side * j, y, side - 3, tall - 3))
    return _svg(parts, f"{row_axis} by {column_axis}", 'class="tiles"', round(width), height, natural=True)


def _tile(cell: Tile, x: float, y: float, width: float, height: float) -> str:
    middle, center = x + width / 2, y + height / 2
    ring = " ring" if cell.ring else ""
    box = f'x="{x:.1f}" y="{y}" width="{width}" height="{height}" rx="4"'
    shade = 0.06 + 0.6 * min(max(cell.shade, 0.0), 1.0)
    note = f'<text class="tick" text-anchor="middle" x="{middle:.1f}" y="{center + 15}">{escape(cell.note)}</text>'
    return (
        f'<g class="said"><rect class="tile hue-{cell.hue}" fill-opacity="{shade:.2f}" {box}/>'
        + (f'<rect class="tile-edge{ring}" {box}/>' if ring else "")
        + f'<text class="tile-text" text-anchor="middle" x="{middle:.1f}" y="{center + (0 if cell.note else 5)}">'
        f"{escape(cell.text)}</text>{note if cell.note else ''}<title>{escape(cell.said)}</title></g>"
    )


def bin_edges(values: Sequence[float]) -> list[float]:
    """Returns the edges of 6 to 32 equal bins over all values, by the Freedman-Diaconis rule."""
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


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.06
    if room <= 1e-9 * max(abs(low), abs(high)):  # a flat line, drawn in the middle
        room = abs(low) * 0.1 or 0.5
    return low - room, high + room


def _path(steps: Sequence[float], values: Sequence[float], x: Any, y: Any) -> str:
    pen_up, parts = True, []
    for step, value in zip(steps, values, strict=True):
        if math.isnan(value):
            pen_up = True
            continue
        parts.append(f"{'M' if pen_up else 'L'}{x(step):.1f},{y(value):.1f}")
        pen_up = False
    return "".join(parts)


def _band(series: Series, x: Any, y: Any) -> str:
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


def _said(series: Series) -> str:
    numbers = [v for v in series.values if not math.isnan(v)]
    if not numbers:
        return f"{series.name}: no finite value"
    return f"{series.name} from {number(numbers[0])} to {number(numbers[-1])}"


def _short(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.7g}")


def _y_axis(ticks: list[float], y: Any, *, width: int = WIDTH, percent: bool = False) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) / 10
    scale, sign = (100, "%") if percent else (1, "")
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y(t) + 3.8:.1f}">'
        f"{tick_text(t * scale, step * scale)}{sign}</text>"
        for t in ticks
    )


def _x_axis(ticks: list[float], x: Any, name: str, *, width: int = WIDTH, height: int = HEIGHT) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) / 10
    base = height - BOTTOM
    axis = f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{base}" y2="{base}"/>'
    marks = "".join(
        f'<line class="axis" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{base}" y2="{base + 4}"/>'
        f'<text class="tick" text-anchor="middle" x="{x(t):.1f}" y="{base + 16}">{tick_text(t, step)}</text>'
        for t in ticks
    )
    middle = (LEFT + width - RIGHT) / 2
    return (
        f'{axis}{marks}<text class="axis-name" text-anchor="middle" x="{middle}" y="{height - 5}">{escape(name)}</text>'
    )


def _svg(
    parts: list[str],
    said: str,
    attributes: str,
    width: int = WIDTH,
    height: int = HEIGHT,
    *,
    natural: bool = False,
) -> Markup:
    """Puts a drawing together; ``natural`` keeps it from growing beyond its own size."""
    size = f' style="max-width:{width}px"' if natural else ""
    head = f'<svg {attributes}{size} viewBox="0 0 {width} {height}" role="img" aria-label="{escape(said)}">'
    return Markup(head + "".join(parts) + "</svg>")
