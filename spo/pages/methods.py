"""The methods as a table and one of them as a page of ten lines, for a terminal and for the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spo.pages.formulas import as_text

DATA_KINDS = ("pairs", "unpaired", "ranked")
"""Kinds of data that losses read: pairs, single completions with labels, and ranked lists."""
WIDE = 110
"""Columns of a terminal from which a table has one column for the title and one for what a method needs."""
RECONSTRUCTION = "reconstruction"
"""Beginning of ``checked`` where no code or formula of the authors could be compared."""


@dataclass(frozen=True)
class MethodKey:
    """A key of a method.

    Attributes:
        name: Key as on the command line.
        default: Default as text.
        comment: Description.
    """

    name: str
    default: str
    comment: str


@dataclass(frozen=True)
class MethodFacts:
    """Facts of a method for lists and pages, from its yaml file and from its loss.

    Attributes:
        name: Member of the config group ``method``.
        title: Title.
        group: Heading under which lists show it.
        paper: Source of the formula.
        changes: Sentence on what it changes against DPO.
        use_when: Sentence on when to use it.
        checked: How far the formula was checked: a word, a colon, and how.
        data: Kind of data that the loss reads, one of :data:`DATA_KINDS`.
        needs: What a run has to provide, in words.
        reads_reference: Whether the loss needs a reference model; its regularizer may need one besides.
        formula: LaTeX of the formulas of the loss.
        keys: Keys of the loss, and beta.
        loss: Dotted path of the class.
        verified: Sentence on what ``spo verify`` does with the method, ``None`` where nobody asked.
    """

    name: str
    title: str
    group: str
    paper: str
    changes: str
    use_when: str
    checked: str
    data: str
    needs: tuple[str, ...]
    reads_reference: bool
    formula: tuple[str, ...]
    keys: tuple[MethodKey, ...]
    loss: str
    verified: str | None = None

    @property
    def checked_by(self) -> str:
        """Return how the formula was checked, in one or two words."""
        return self.checked.partition(":")[0]

    @property
    def beta(self) -> str:
        """Return the default of beta as text, empty where there is none."""
        return next((key.default for key in self.keys if key.name == "beta"), "")


def in_groups(methods: Iterable[MethodFacts]) -> Iterator[tuple[str, list[MethodFacts]]]:
    """Yield each heading with its methods, which are in the order of headings already."""
    for group, some in groupby(methods, lambda method: method.group):
        yield group, list(some)


def methods_table(methods: Sequence[MethodFacts], width: int) -> RenderableType:
    """Return a table with the methods under their headings.

    Args:
        methods: Methods in the order of headings.
        width: Columns of the terminal.
    """
    name, data = max(len(method.name) for method in methods), max(map(len, DATA_KINDS))
    checked = max(len(word) for method in methods for word in (*method.checked_by.split(), "checked"))
    wide = width >= WIDE
    if wide:
        checked = max(checked, *(len(method.checked_by) for method in methods))
    rest = max(20, width - name - data - checked - 2 * (4 if wide else 3))
    texts = {"what it is": rest * 11 // 20, "needs": rest - rest * 11 // 20} if wide else {"what it is; needs": rest}
    columns = {"method": name, **texts, "data": data, "checked": checked}
    parts: list[RenderableType] = [_table(columns, show_header=True)]
    for group, some in in_groups(methods):
        table = _table(columns, show_header=False)
        for method in some:
            needs = ", ".join(method.needs)
            words = [Text(method.title), Text(needs)] if wide else [_title_and_needs(method.title, needs)]
            table.add_row(method.name, *words, method.data, Text(method.checked_by))
        parts += [Text(f"\n{group}", style="bold"), table]
    return Group(*parts)


def _table(columns: Mapping[str, int], *, show_header: bool) -> Table:
    """Return an empty table whose columns have the given widths, so that those of all groups are aligned."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=show_header, header_style="dim")
    for heading, size in columns.items():
        table.add_column(heading, width=size, overflow="fold")
    return table


def _title_and_needs(title: str, needs: str) -> Text:
    return Text(title).append(f"\nneeds {needs}" if needs else "", style="dim")


def method_page(method: MethodFacts) -> RenderableType:
    """Return the page of a method."""
    page = Table.grid(padding=(0, 2, 0, 0))
    page.add_column(style="bold", no_wrap=True)
    page.add_column(overflow="fold")
    for label, words in page_rows(method).items():
        page.add_row(label, Text(words))
    for number, key in enumerate(method.keys):
        page.add_row("" if number else "keys", Text(f"{key.name}={key.default}").append(_behind(key), style="dim"))
    for label, words in page_end(method).items():
        page.add_row(label, Text(words))
    heading = Text(method.name, style="bold").append(f": {method.title}", style="not bold")
    return Group(heading, page)


def _behind(key: MethodKey) -> str:
    return f"  {key.comment}" if key.comment else ""


def page_rows(method: MethodFacts) -> dict[str, str]:
    """Return the rows of a page above its keys."""
    rows = {
        "changes": method.changes,
        "use when": method.use_when,
        "formula": ";  ".join(map(as_text, method.formula)),
        "group": f"{method.group} (data: {method.data})",
        "needs": ", ".join(method.needs),
    }
    return {label: words for label, words in rows.items() if words}


def page_end(method: MethodFacts) -> dict[str, str]:
    """Return the rows of a page below its keys."""
    rows = {
        "source": f"{method.paper or 'no paper'}; the docstring of {method.loss} defines the symbols",
        "checked": method.checked,
        "verify": method.verified or "",
    }
    return {label: words for label, words in rows.items() if words}


def markdown_table(methods: Sequence[MethodFacts]) -> str:
    """Return a table in Markdown, in which each heading is a row of its own."""
    lines = ["| `method=` | what it is | paper | needs | checked | default beta |", "|---|---|---|---|---|---|"]
    for group, some in in_groups(methods):
        lines.append(f"| **{group}** | | | | | |")
        for method in some:
            needs = ", ".join(f"`{need}`" if "=" in need else need for need in (method.data, *method.needs))
            checked = f"**{method.checked_by}**" if method.checked_by == RECONSTRUCTION else method.checked_by
            cells = (f"`{method.name}`", method.title, linked(method.paper), needs, checked, method.beta)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def linked(paper: str) -> str:
    """Return a source with its arXiv numbers as links in Markdown."""
    return re.sub(r"arXiv:([\w.]*\w)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
