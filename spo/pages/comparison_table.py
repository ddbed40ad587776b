"""The table of a comparison in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from spo.comparison.compare import Comparison, Method
from spo.metrics.catalogue import label, unit
from spo.metrics.trained import COSTS, cost_text
from spo.pages.comparison_files import columns
from spo.pages.comparison_words import (
    describe_differences,
    describe_duels,
    describe_procedure,
    describe_training,
    interval,
    mean_over_seeds,
)
from spo.wording import clean, number

# Characters of the columns; methods that do not fit go into a table below.
_LABELS, _METHOD = 26, 17


def print_comparison(comparison: Comparison) -> None:
    """Print the table, the differences, and the problems of an unfair comparison."""
    console = Console()
    _problems(console, comparison)
    fitting = max(1, (console.width - _LABELS) // _METHOD)
    for first in range(0, len(comparison.methods), fitting):
        console.print(_table(console, comparison, comparison.methods[first : first + fitting]))
    console.print()
    for sentence, significant in describe_differences(comparison):
        console.print(_text(console, sentence, "bold" if significant else ""))
    if duels := describe_duels(comparison):
        console.print(_text(console, duels))
    for sentence in (*describe_procedure(comparison), *comparison.notes):
        console.print(_text(console, sentence, "dim"))
    if comparison.problems:
        console.print(_text(console, "(!) not a fair comparison: see above", "bold red"))


def _problems(console: Console, comparison: Comparison) -> None:
    if comparison.problems:
        lines = "\n".join(f"- {problem.text}" for problem in comparison.problems)
        title = Text("not a fair comparison: made with --anyway", "bold red")
        console.print(Panel(_text(console, lines), title=title, title_align="left", border_style="red"))


def _table(console: Console, comparison: Comparison, methods: Sequence[Method]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(_text(console, _counted(comparison), "dim"))
    for method in methods:
        mark = " (!)" if method.problems else ""
        table.add_column(
            _text(console, method.name + mark, "bold red" if mark else "bold"), justify="right", max_width=_METHOD - 2
        )
    table.add_row("best setting", *(_text(console, method.best.label.replace(", ", "\n")) for method in methods))
    table.add_row("settings tried", *(str(len(method.settings)) for method in methods))
    table.add_row("seeds", *(", ".join(map(str, method.best.seeds)) for method in methods))
    trained = (describe_training(method.best).replace(", ", "\n") for method in methods)
    table.add_row("trained", *(_text(console, words) for words in trained))
    for key, (name, unit_of_cost) in COSTS.items():
        texts = (cost_text(key, mean_over_seeds(method.best, key)) for method in methods)
        table.add_row(Text.assemble(name, "\n", (unit_of_cost, "dim")), *texts)
    table.add_section()
    for name in columns(comparison):
        cells = []
        for method in methods:
            estimate = method.estimates.get(name)
            value = number(None if estimate is None else estimate.value)
            style = "bold" if name == comparison.metric_name else ""
            cells.append(Text.assemble((value, style), "\n", (interval(estimate), "dim")))
        table.add_row(Text.assemble(label(name), "\n", (unit(name), "dim")), *cells)
    return table


def _counted(comparison: Comparison) -> str:
    return f"{len(comparison.methods)} {comparison.groups.noun}s"


def _text(console: Console, text: str, style: str = "") -> Text:
    return Text(clean(text).encode(console.encoding, "replace").decode(console.encoding), style)
