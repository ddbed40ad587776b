"""The table that ``spo iterate`` prints at its end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spo.metrics.catalogue import label
from spo.metrics.rounds import ROUND_OPPONENTS, Measured, round_metrics
from spo.pages.iteration_page import FIRST_KL, describe_status, quantities, time_text
from spo.records.iteration import Iteration, RoundStatus, read_iteration
from spo.wording import number

_STYLES: dict[RoundStatus, str] = {"finished": "green", "failed": "red", "running": "yellow"}
# A terminal is narrow, so the table leaves reward and self-BLEU to the page.
_QUANTITIES = (FIRST_KL, "entropy", "length", "distinct_2")


def print_iteration(directory: Path, console: Console | None = None) -> None:
    """Print one row per round: its state, its win rates with their intervals, and the main quantities; then alarms.

    Args:
        directory: Directory of the iteration.
        console: Console to print to; ``None`` for the terminal.

    Raises:
        NotAnIterationError: The directory does not hold an iteration.
    """
    console = console or Console()
    iteration = read_iteration(directory)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("round", overflow="fold")
    for name in ROUND_OPPONENTS:
        table.add_column(f"against\n{name}", justify="right", no_wrap=True)
    for header in (*(label(key).replace("-", "-\n") for key in _QUANTITIES), "time"):
        table.add_column(header, justify="right", overflow="fold")
    for one in iteration.rounds:
        found = round_metrics(directory, iteration, one.number)
        cells = [_cell(found.win_rates.get(name), ends=True) for name in ROUND_OPPONENTS]
        cells += [_cell(quantities(found)[name]) for name in _QUANTITIES]
        state = "" if one.status == "finished" else f" {one.status}"
        table.add_row(Text(f"{one.number}{state}", _STYLES[one.status]), *cells, time_text(one.seconds))
    console.print(f"\niteration {directory}", soft_wrap=True, markup=False, highlight=False)
    console.print(table)
    for words in _alarms(iteration):
        console.print(Text(words, "yellow"), soft_wrap=True)
    words = (
        "win rates with 95% intervals over prompts, against the previous round, the first model and chosen responses"
    )
    console.print(Text(words), soft_wrap=True)
    console.print(Text(describe_status(iteration)), soft_wrap=True)


def _cell(one: Measured | None, *, ends: bool = False) -> str:
    if one is None:
        return ""
    known = ends and one.low is not None and one.high is not None
    return number(one.value) + (f"\n{one.low:.2f}–{one.high:.2f}" if known else "")


def _alarms(iteration: Iteration) -> list[str]:
    return [words for one in iteration.rounds for words in one.alarms]
