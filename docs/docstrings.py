"""Docstrings of the site: roles of Sphinx become code, formulas become MathML, and tables become Markdown."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

from spo.pages.formulas import DISPLAYED

TABLE = re.compile(r"^(?P<rule> *=+(?: +=+)+)\n(?P<head>.*)\n(?P=rule)\n(?P<body>(?:.*\n)*?)(?P=rule)\n", re.MULTILINE)
ROLE = re.compile(r":(?P<kind>\w+):`~?(?P<text>[^`]*)`")


class PlainMarkup(Extension):
    """Rewrites each docstring before mkdocstrings reads it as Markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Return a docstring with formulas as MathML, roles as code, and tables in the syntax of Markdown."""
    text = TABLE.sub(_table, DISPLAYED.sub(_display, text + "\n"))
    return ROLE.sub(_role, text).rstrip("\n")


def _display(match: re.Match[str]) -> str:
    latex = " ".join(dedent(f"{match['first']}\n{match['rest']}").split())
    return f'{match["indent"]}<div class="formula">{convert(latex, display="block")}</div>\n\n'


def _role(match: re.Match[str]) -> str:
    return convert(match["text"]) if match["kind"] == "math" else f"`{match['text']}`"


def _table(match: re.Match[str]) -> str:
    columns = [slice(*column.span()) for column in re.finditer("=+", match["rule"])]
    columns[-1] = slice(columns[-1].start, None)
    rows = [match["head"], *match["body"].splitlines()]
    cells = [[row[column].strip().replace("|", r"\|") for column in columns] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]]) + "\n"
