"""Docstrings for the site: Sphinx's roles become code, and its formulas MathML, when the site is built."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

FORMULA = re.compile(
    r"""^(?P<indent>[ ]*)\.\.[ ]math::(?P<first>.*)\n  # the directive, and what follows it on its line
    (?P<rest>(?:(?P=indent)[ ]+\S.*\n|\n(?=(?P=indent)[ ]))*)  # indented lines, with blank ones between them""",
    re.MULTILINE | re.VERBOSE,
)
ROLE = re.compile(r":(?P<kind>\w+):`~?(?P<text>[^`]*)`")


class PlainMarkup(Extension):
    """Rewrites each docstring before mkdocstrings reads it as Markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Return a docstring with formulas as MathML and roles as code."""
    text = FORMULA.sub(_display, text + "\n")
    return ROLE.sub(_role, text).rstrip("\n")


def _display(match: re.Match[str]) -> str:
    latex = " ".join(dedent(f"{match['first']}\n{match['rest']}").split())
    return f'{match["indent"]}<div class="formula">{convert(latex, display="block")}</div>\n\n'


def _role(match: re.Match[str]) -> str:
    return convert(match["text"]) if match["kind"] == "math" else f"`{match['text']}`"
