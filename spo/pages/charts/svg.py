"""Marks, and the SVG element around a drawing."""

from __future__ import annotations

from markupsafe import Markup, escape

from spo.pages.charts.axes import HEIGHT, WIDTH

_SHAPES = (
    "M1,0A1,1 0 1 1 -1,0A1,1 0 1 1 1,0Z",
    "M-.9,-.9H.9V.9H-.9Z",
    "M0,-1.15L1.1,.85H-1.1Z",
    "M0,-1.25L1.1,0L0,1.25L-1.1,0Z",
    "M0,1.15L1.1,-.85H-1.1Z",
    "M-.35,-1.1H.35V-.35H1.1V.35H.35V1.1H-.35V.35H-1.1V-.35H-.35Z",
    "M-1.1,-.55H1.1V.55H-1.1Z",
    "M-.55,-1.1H.55V1.1H-.55Z",
    "M0,-1.35L.38,-.38L1.35,0L.38,.38L0,1.35L-.38,.38L-1.35,0L-.38,-.38Z",
    "M-1.05,-.6L-.6,-1.05L0,-.45L.6,-1.05L1.05,-.6L.45,0L1.05,.6L.6,1.05L0,.45L-.6,1.05L-1.05,.6L-.45,0Z",
    "M-1.15,0L-.57,-1H.57L1.15,0L.57,1H-.57Z",
    "M-1.15,.7A1.15,1.15 0 0 1 1.15,.7Z",
)
HUES = len(_SHAPES)
"""Number of different colors and shapes; the style sheet of the comparison has as many colors."""


def marker(hue: int, x: float, y: float, size: float, look: str = "") -> str:
    """Draw a mark. Each color has its own shape, so that either distinguishes marks.

    Args:
        hue: Number of its color and shape, from 1.
        x: Horizontal position of its center.
        y: Vertical position of its center.
        size: Half of its height.
        look: Further class names.
    """
    shape = _SHAPES[(hue - 1) % HUES]
    return f'<path class="mark hue-{hue} {look}" transform="translate({x:.1f} {y:.1f}) scale({size:g})" d="{shape}"/>'


def svg(
    parts: list[str],
    description: str,
    attributes: str,
    width: int = WIDTH,
    height: int = HEIGHT,
    *,
    natural: bool = False,
) -> Markup:
    """Wrap parts of a drawing into an SVG element.

    Args:
        parts: SVG elements of the drawing.
        description: Text for screen readers.
        attributes: Attributes of the element.
        width: Width of the view box.
        height: Height of the view box.
        natural: Whether the drawing does not grow beyond its own size.
    """
    size = f' style="width:{width}px;max-width:100%"' if natural else ""
    head = f'<svg {attributes}{size} viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
    return Markup(head + "".join(parts) + "</svg>")
