"""Ticks, axes and the sizes that charts share."""

from __future__ import annotations

import math
from collections.abc import Callable

from markupsafe import escape

# Maps a number to its place on an axis.
Scale = Callable[[float], float]

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36


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


def draw_y_axis(ticks: list[float], y: Scale, *, width: int = WIDTH, percent: bool = False) -> str:
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) / 10
    scale, sign = (100, "%") if percent else (1, "")
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y(t) + 3.8:.1f}">'
        f"{tick_text(t * scale, step * scale)}{sign}</text>"
        for t in ticks
    )


def draw_x_axis(ticks: list[float], x: Scale, name: str, *, width: int = WIDTH, height: int = HEIGHT) -> str:
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
