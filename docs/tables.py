"""Generator of the README's tables of methods and config groups from conf/: ``python -m docs.tables README.md``."""

from __future__ import annotations

import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from spo.config.groups import group_members
from spo.errors import UserError
from spo.pages.methods import markdown_table
from spo.resources import MAIN_CONFIG, conf_dir
from spo.stages.methods import read_methods

PROSE_WIDTH = 100
"""Most columns of a line of prose in the documentation."""


def methods_table(conf: Path) -> str:
    """Write a table with one line for each yaml file of ``conf/method``, under headings, and what its words count."""
    methods = read_methods([conf])
    counts = Counter(method.checked_by for method in methods if method.checked_by)
    summary = ", ".join(f"{number} {word}" for word, number in counts.most_common())
    words = f"{len(methods)} methods, by how their formulas were checked: {summary}."
    return f"{textwrap.fill(words, PROSE_WIDTH)}\n\n{markdown_table(methods)}"


def groups_table(conf: Path) -> str:
    """Write a table with one line for each config group."""
    lines = ["| group | members, the default in bold |", "|---|---|"]
    defaults = _chosen(yaml.safe_load((conf / f"{MAIN_CONFIG}.yaml").read_text()))
    for group, members in group_members([conf]).items():
        chosen = defaults.get(group)
        shown = [f"**`{name}`**" if name == chosen else f"`{name}`" for name in members]
        lines.append(f"| `{group}` | {', '.join(shown)} |")
    return "\n".join(lines)


def rewrite(text: str, conf: Path) -> str:
    """Replace the tables between their markers by those that follow from the configuration.

    Args:
        text: Text of a document with a pair of markers for each table.
        conf: Folder of the configuration.

    Raises:
        UserError: If a pair of markers is missing.
    """
    for name, table in {"methods": methods_table(conf), "groups": groups_table(conf)}.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        pattern = re.escape(start) + ".*?" + re.escape(end)
        new = f"{start}{table}\n{end}".replace("\\", r"\\")  # `re.sub` interprets backslashes in a replacement.
        text, found = re.subn(pattern, new, text, flags=re.S)
        if not found:
            raise UserError(f"the markers of a table are missing: write {start.strip()} and {end} on two lines")
    return text


def _chosen(node: dict[str, Any]) -> dict[str, str]:
    """Return the group and member of each entry in a defaults list."""
    return {
        group: member
        for entry in node.get("defaults", [])
        if isinstance(entry, dict)
        for group, member in entry.items()
        if member is not None
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(rewrite(path.read_text(), conf_dir()))
