"""Charts as inline SVG, drawn in Python so that a page shows them without a script and prints them as they are.

Colors are class names (``hue-1`` ...) that the page's style sheet defines for light and dark mode. No chart is read by
color alone: a validation series is also dashed and dotted, and each method has a mark of its own shape.
"""

from spo.pages.charts.axes import nice_ticks, tick_text
from spo.pages.charts.bars import Amount, Whisker, amounts, bin_edges, histogram, interval_bar, whiskers
from spo.pages.charts.keys import NOT_SET, KeyAxis, key_axis
from spo.pages.charts.lines import MAX_POINTS, LineChart, Series, line_chart, thin
from spo.pages.charts.parallel import Tried, over_key, parallel
from spo.pages.charts.points import Cloud, Point, scatter
from spo.pages.charts.rounds import RoundSeries, rounds_chart
from spo.pages.charts.svg import HUES, marker
from spo.pages.charts.tiles import Tile, tiles

__all__ = [
    "HUES",
    "MAX_POINTS",
    "NOT_SET",
    "Amount",
    "Cloud",
    "KeyAxis",
    "LineChart",
    "Point",
    "RoundSeries",
    "Series",
    "Tile",
    "Tried",
    "Whisker",
    "amounts",
    "bin_edges",
    "histogram",
    "interval_bar",
    "key_axis",
    "line_chart",
    "marker",
    "nice_ticks",
    "over_key",
    "parallel",
    "rounds_chart",
    "scatter",
    "thin",
    "tick_text",
    "tiles",
    "whiskers",
]
