"""The table that ``spo iterate`` prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from spo.metrics.catalogue import label
from spo.metrics.rounds import ROUND_OPPONENTS, Measured, RoundMetrics, round_metrics
from spo.pages.iteration_page import FIRST_KL, describe_status, quantities, time_text
from spo.records.iteration import Iteration, RoundStatus, read_iteration
from spo.wording import number

_STYLES: dict[RoundStatus, str] = {"finished": "green", "failed": "red", "running": "yellow"}
# A terminal is narrow, so the table leaves reward and self-BLEU to the page. In a narrower one, the last quantities
# are left out first.
_QUANTITIES = (FIRST_KL, "entropy", "length", "distinct_2")

_MEASURING_WIDTH = 1000
"""Width in characters at which no table is cut."""


def print_iteration(directory: Path, console: Console | None = None) -> None:
    """Print one row per round: its state, its win rates with their intervals, and the main quantities; then alarms.

    Quantities for which the terminal is too narrow are left out, and named below the table.

    Args:
        directory: Directory of the iteration.
        console: Console to print to; ``None`` for the terminal.

    Raises:
        NotAnIterationError: The directory does not hold an iteration.
    """
    console = console or Console()
    iteration = read_iteration(directory)
    measured = [round_metrics(directory, iteration, one.number) for one in iteration.rounds]
    shown = len(_QUANTITIES)
    table, width = _table(console, iteration, measured, _QUANTITIES)
    while width > console.width and shown > 0:
        shown -= 1
        table, width = _table(console, iteration, measured, _QUANTITIES[:shown])
    console.print(f"\niteration {directory}", soft_wrap=True, markup=False, highlight=False)
    console.print(table, width=width, crop=False)
    for words in _alarms(iteration):
        console.print(Text(words, "yellow"), soft_wrap=True)
    words = (
        "win rates with 95% intervals over prompts, against the previous round, the first model and chosen responses"
    )
    console.print(Text(words), soft_wrap=True)
    if left_out := [label(key) for key in _QUANTITIES[shown:]]:
        console.print(Text(f"in a wider terminal, and on the page: {', '.join(left_out)}"), soft_wrap=True)
    console.print(Text(describe_status(iteration)), soft_wrap=True)


def _table(
    console: Console, iteration: Iteration, measured: Sequence[RoundMetrics], names: Sequence[str]
) -> tuple[Table, int]:
    """Return the table with some of the quantities, and its width in characters, at which nothing is cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("round", no_wrap=True)
    for opponent in ROUND_OPPONENTS:
        table.add_column(f"against\n{opponent}", justify="right", no_wrap=True)
    for name in names:
        header = "KL to\nfirst" if name == FIRST_KL else label(name).replace("-", "-\n")
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for one, found in zip(iteration.rounds, measured, strict=True):
        cells = [_cell(found.win_rates.get(opponent), ends=True) for opponent in ROUND_OPPONENTS]
        cells += [_cell(quantities(found)[name]) for name in names]
        state = "" if one.status == "finished" else f" {one.status}"
        table.add_row(Text(f"{one.number}{state}", _STYLES[one.status]), *cells, time_text(one.seconds))
    return table, Measurement.get(console, console.options.update(width=_MEASURING_WIDTH), table).maximum


def _cell(one: Measured | None, *, ends: bool = False) -> str:
    if one is None:
        return ""
    known = ends and one.low is not None and one.high is not None
    return number(one.value) + (f"\n{one.low:.2f}–{one.high:.2f}" if known else "")


def _alarms(iteration: Iteration) -> list[str]:
    return [words for one in iteration.rounds for words in one.alarms]
