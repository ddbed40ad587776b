"""Maps of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from spo.pages.charts.svg import svg


@dataclass(frozen=True)
class Tile:
    """A cell of a map.

    Attributes:
        text: Text on the cell.
        description: Text under the pointer.
        shade: Strength of its color, from 0 to 1.
        hue: Number of its color; ``None`` for the color of a quantity.
        ring: Whether an edge marks it as selected.
        note: Second, smaller line of text.
    """

    text: str
    description: str
    shade: float
    hue: int | None = 1
    ring: bool = False
    note: str = ""


def tiles(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Tile | None]], row_axis: str, column_axis: str
) -> Markup:
    """Draw a map of cells with shaded colors.

    Args:
        rows: Names of the rows.
        columns: Names of the columns.
        cells: Cells, one sequence per row; ``None`` leaves a hole.
        row_axis: Name of the vertical axis.
        column_axis: Name of the horizontal axis.
    """
    # Names of groups, such as "spo, global_kl", have a line for each part.
    lines = [name.split(", ") for name in columns]
    longest = max(len(line) for name in lines for line in name)
    side, tall, top = max(78, 16 + round(6.6 * longest)), 50, 31 + 13 * max(map(len, lines))
    left = 34 + max(7.2 * max(map(len, rows)), 12)
    width, height = left + side * len(columns) + 4, top + tall * len(rows) + 6
    parts = [f'<text class="axis-name" x="{left:.0f}" y="12">{escape(column_axis)} →</text>']
    parts.append(f'<text class="axis-name" x="0" y="{top - 10}">{escape(row_axis)} ↓</text>')
    for place, words in enumerate(lines):
        middle = left + side * (place + 0.5)
        for above, line in enumerate(reversed(words)):
            y = top - 10 - 13 * above
            parts.append(f'<text class="tick" text-anchor="middle" x="{middle:.1f}" y="{y}">{escape(line)}</text>')
    for i, name in enumerate(rows):
        y = top + tall * i
        parts.append(
            f'<text class="tick" text-anchor="end" x="{left - 9:.1f}" y="{y + tall / 2 + 4}">{escape(name)}</text>'
        )
        for j, cell in enumerate(cells[i]):
            parts.append("" if cell is None else _tile(cell, left + side * j, y, side - 3, tall - 3))
    return svg(parts, f"{row_axis} by {column_axis}", 'class="tiles"', round(width), height, natural=True)


def _tile(cell: Tile, x: float, y: float, width: float, height: float) -> str:
    middle, center = x + width / 2, y + height / 2
    ring = " ring" if cell.ring else ""
    box = f'x="{x:.1f}" y="{y}" width="{width}" height="{height}" rx="4"'
    # The ink of quantities is darker than any color of a method, so that less of it leaves the text readable.
    color, strongest = ("quantity", 0.34) if cell.hue is None else (f"hue-{cell.hue}", 0.6)
    shade = 0.06 + strongest * min(max(cell.shade, 0.0), 1.0)
    note = f'<text class="tick" text-anchor="middle" x="{middle:.1f}" y="{center + 15}">{escape(cell.note)}</text>'
    return (
        f'<g class="described"><rect class="tile {color}" fill-opacity="{shade:.2f}" {box}/>'
        + (f'<rect class="tile-edge{ring}" {box}/>' if ring else "")
        + f'<text class="tile-text" text-anchor="middle" x="{middle:.1f}" y="{center + (0 if cell.note else 5)}">'
        f"{escape(cell.text)}</text>{note if cell.note else ''}<title>{escape(cell.description)}</title></g>"
    )
