"""Formulas of docstrings: found in their markup, and written as plain text for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from textwrap import dedent

DISPLAYED = re.compile(
    r"""^(?P<indent>[ ]*)\.\.[ ]math::(?P<first>.*)\n  # the directive, and what follows it on its line
    (?P<rest>(?:(?P=indent)[ ]+\S.*\n|\n(?=(?P=indent)[ ]))*)  # indented lines, with blank ones between them""",
    re.MULTILINE | re.VERBOSE,
)
"""A formula in lines of its own, in the markup of Sphinx."""
_INLINE = re.compile(r":math:`([^`]*)`")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
_SYMBOLS = {
    "cdot": "*", "times": "*", "mid": "|", "vert": "|", "lvert": "|", "rvert": "|", "Vert": "||", "lVert": "||",
    "rVert": "||", "|": "||", "le": "<=", "leq": "<=", "ge": ">=", "geq": ">=", "ne": "!=", "neq": "!=", "sim": "~",
    "approx": "~=", "propto": "proportional to", "infty": "infinity", "ldots": "...", "dots": "...", "cdots": "...",
    "to": "->", "rightarrow": "->", "mapsto": "->", "gets": "<-", "ell": "l", "prime": "'", "circ": "o", "ast": "*",
    "langle": "<", "rangle": ">", "lbrace": "{", "rbrace": "}", "{": "{", "}": "}", "\\": "; ", "%": "%", "_": "_",
    "&": "&", "#": "#", "quad": "  ", "qquad": "  ", ",": " ", ";": " ", ":": " ", " ": " ", "!": "", ">": " ",
    "left": "", "right": "", "big": "", "Big": "", "bigl": "", "bigr": "", "Bigl": "", "Bigr": "", "displaystyle": "",
    "limits": "", "nolimits": "",
}  # fmt: skip
"""Text of commands whose name is not readable by itself; all others are written by their name, such as alpha."""
_FONTS = {"mathrm", "text", "operatorname", "mathbb", "mathcal", "mathbf", "boldsymbol", "textrm", "mathit", "texttt"}
_ACCENTS = {"hat": "hat", "bar": "bar", "tilde": "tilde", "widehat": "hat", "overline": "bar", "widetilde": "tilde"}
_CALLED = {"sigma", "log", "exp", "max", "min", "pi", "Phi", "phi", "ln", "tanh", "sin", "cos", "softmax", "Pr"}
"""Names that stand before their argument without a space, such as ``sigma(x)``."""


def formulas_of(docstring: str) -> list[str]:
    """Return the LaTeX of the formulas of a docstring: those in lines of their own, else those within sentences."""
    found = [
        " ".join(dedent(f"{match['first']}\n{match['rest']}").split()) for match in DISPLAYED.finditer(docstring + "\n")
    ]
    return found or _INLINE.findall(docstring)


def as_text(latex: str) -> str:
    r"""Return a formula of a docstring as plain text, such as ``log(a/b)`` for ``\log\frac{a}{b}``.

    Commands are written by their names, fractions with a slash, and groups in parentheses where they are needed.

    Args:
        latex: LaTeX of a formula.
    """
    text = _sequence(_Tokens(latex), "")
    text = re.sub(r" {3,}", "  ", text).strip()
    text = re.sub(r" *; *", "; ", text)
    text = re.sub(r"(?<=[(\[{]) +| +(?=[)\],;}])", "", text)
    return re.sub(r"(?<=[^ ,;:]) {2,}", " ", text)


class _Tokens:
    """Tokens of a formula, read one after the other, with a look at the next one."""

    def __init__(self, latex: str) -> None:
        self._rest: Iterator[str] = (" " if token.isspace() else token for token in _TOKEN.findall(latex))
        self.next: str = next(self._rest, "")

    def pop(self) -> str:
        """Return the next token and move behind it."""
        token, self.next = self.next, next(self._rest, "")
        return token

    def skip_space(self) -> None:
        """Move behind spaces."""
        while self.next == " ":
            self.pop()


def _sequence(tokens: _Tokens, end: str) -> str:
    """Return the text up to a token, which is removed."""
    text, token = "", ""
    while tokens.next not in ("", end):
        before, token = token, tokens.pop()
        if token in ("^", "_"):
            tokens.skip_space()
            text = text.rstrip() + token + _in_parentheses(_argument(tokens))
        elif token in ("\\frac", "\\tfrac", "\\dfrac"):
            text = _fraction(tokens, text)
        elif token == "&":
            text += " "
        else:
            text = _joined(text, _text_of(token, tokens), token, before)
            if token in ("\\lVert", "\\lvert", "\\langle"):
                tokens.skip_space()
            if token[1:] in _CALLED and token[0] == "\\" and tokens.next in ("\\left", "\\big", "\\Big"):
                tokens.pop()
    tokens.pop()
    return text


def _text_of(token: str, tokens: _Tokens) -> str:
    """Return the text of a token and of its arguments."""
    name = token[1:]
    if token == "{":
        return _sequence(tokens, "}")
    if token[0] != "\\":
        return token
    if name in _FONTS:
        return _argument(tokens, keep_space=name.startswith("text"))
    if name in _ACCENTS:
        return f"{_argument(tokens)}_{_ACCENTS[name]}"
    if name == "sqrt":
        return f"sqrt({_argument(tokens)})"
    if name in ("underbrace", "overbrace"):
        return _argument(tokens)
    if name in ("begin", "end"):
        environment = _argument(tokens)
        brackets = {"cases": "{}"}.get(environment, "  ")
        return brackets[name == "end"].strip()
    return _SYMBOLS.get(name, name)


def _argument(tokens: _Tokens, keep_space: bool = False) -> str:
    """Return the text of the group or of the single token that follows."""
    tokens.skip_space()
    token = tokens.pop()
    text = _text_of(token, tokens) if token else ""
    return text if keep_space else text.strip()


def _fraction(tokens: _Tokens, before: str) -> str:
    """Return the text before a fraction and the fraction, in parentheses unless it stands between plus or minus."""
    parts = [_in_parentheses(_argument(tokens)) for _ in range(2)]
    fraction = "/".join(parts)
    spaces = tokens.next == " "
    tokens.skip_space()
    stands_alone = not before.strip() or before.rstrip()[-1] in "(+-=,[{|"
    if not stands_alone or tokens.next not in ("", "}", ")", "]", ",", "+", "-", "=", "\\right", "\\quad", "\\\\", "&"):
        fraction = f"({fraction})"
    return _joined(before, fraction, "\\frac") + (" " if spaces else "")


def _joined(left: str, right: str, token: str, before: str = "") -> str:
    """Return two texts with a space between words, and before a parenthesis that does not follow a function.

    Args:
        left: Text so far.
        right: Text of a token.
        token: The token.
        before: The token before it.
    """
    if not left or not right:
        return left + right
    is_command = token[0] == "\\"
    ends_word = left[-1].isalnum() or left[-1] == ")"
    if right[0].isalnum() and ((is_command and ends_word) or (before[:1] == "\\" and left[-1].isalnum())):
        return f"{left} {right}"
    name = re.search(r"[A-Za-z]+$", left)
    if token == "\\frac" and right[0] == "(" and name and name[0] not in _CALLED:
        return f"{left} {right}"
    return left + right


def _in_parentheses(text: str) -> str:
    """Return a text as it is if it is one word, number or call, else in parentheses."""
    text = text.strip()
    if re.fullmatch(r"\|[^|]*\|", text):
        return text
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and letter not in ")]}" and not (letter.isalnum() or letter in "_.*'^"):
            return f"({text})"
        if depth == 0 and letter in ")]}" and place + 1 < len(text) and text[place + 1] not in "^_":
            return f"({text})"
    return text
