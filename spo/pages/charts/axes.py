"""Ticks, axes and the sizes that charts share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import escape

# Maps a number to its place on an axis.
Scale = Callable[[float], float]

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36
# An axis is stretched where the largest number is more than this many times the median.
_SPREAD = 5.0


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers in [low, high], in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """Write a tick with as many decimals as the distance between ticks needs, and thousands as k and M."""
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


def padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.06
    if room <= 1e-9 * max(abs(low), abs(high)):  # A flat line is drawn in the middle.
        room = abs(low) * 0.1 or 0.5
    return low - room, high + room


@dataclass(frozen=True)
class Stretch:
    """A scale on which numbers that spread over powers of ten can be told apart.

    Attributes:
        name: Name of the scale for the axis; empty for the plain one.
        place: Function from a number to its place, in any unit.
    """

    name: str
    place: Scale


PLAIN = Stretch("", lambda value: value)


def stretch_for(values: Sequence[float]) -> Stretch:
    """Choose the scale of an axis: logarithmic if the largest number is many times the median, else plain.

    On the logarithmic scale, zero (the KL of the reference) is drawn half a power of ten below the smallest number.
    So is what is less than a ten-thousandth of the largest. Where numbers are zero or negative themselves, the square
    root takes the place of the logarithm.

    Args:
        values: Numbers that have to be told apart.
    """
    sizes = sorted(abs(value) for value in values)
    if not sizes or sizes[-1] <= _SPREAD * sizes[len(sizes) // 2]:
        return PLAIN
    smallest = min(values)
    if smallest <= 0:
        return Stretch("square-root scale", lambda value: math.copysign(math.sqrt(abs(value)), value))
    zero = math.log10(max(smallest, 1e-4 * sizes[-1])) - 0.5
    return Stretch("logarithmic scale", lambda value: max(zero, math.log10(value)) if value > 0 else zero)


def stretched_ticks(low: float, high: float, place: Scale, gap: float) -> list[float]:
    """Return zero and the numbers 1, 2 and 5 times a power of ten in [low, high] that stand apart.

    Args:
        low: Lowest number.
        high: Highest number.
        place: Function from a number to its place.
        gap: Smallest distance between two places.
    """
    largest = max(abs(low), abs(high))
    top = math.floor(math.log10(largest))
    # Powers of ten come first, so that they are not crowded out.
    sizes = [m * 10.0**power for m in (1, 5, 2) for power in range(top, top - 7, -1)]
    kept: list[float] = []
    for tick in (0.0, *(sign * size for size in sizes for sign in (1, -1))):
        if low <= tick <= high and all(abs(place(tick) - place(other)) >= gap for other in kept):
            kept.append(tick)
    return sorted(kept)


def draw_y_axis(ticks: list[float], y: Scale, *, width: int = WIDTH, percent: bool = False) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) / 10
    scale, sign = (100, "%") if percent else (1, "")
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y(t) + 3.8:.1f}">'
        f"{tick_text(t * scale, step * scale)}{sign}</text>"
        for t in ticks
    )


def draw_x_axis(
    ticks: list[float], x: Scale, name: str, *, width: int = WIDTH, height: int = HEIGHT, even: bool = True
) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) / 10
    base = height - BOTTOM
    axis = f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{base}" y2="{base}"/>'
    marks = "".join(
        f'<line class="axis" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{base}" y2="{base + 4}"/>'
        f'<text class="tick" text-anchor="middle" x="{x(t):.1f}" y="{base + 16}">'
        f"{tick_text(t, step if even else 10.0 ** math.floor(math.log10(abs(t) or 1)))}</text>"
        for t in ticks
    )
    middle = (LEFT + width - RIGHT) / 2
    return (
        f'{axis}{marks}<text class="axis-name" text-anchor="middle" x="{middle}" y="{height - 5}">{escape(name)}</text>'
    )
