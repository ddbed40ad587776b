"""A bug planted in a function of the package, for as long as a context lasts."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pydoc import locate
from types import CodeType, FunctionType
from typing import Any

MAX_IDS = 3
"""Largest number of tests and rows of a mutant."""


@dataclass(frozen=True)
class Mutant:
    """A bug, as an edit of the text of one function.

    Attributes:
        name: Name on the command line.
        function: Dotted name of the function, method or property.
        edits: Pairs of a text that occurs once in the function, and the wrong text.
        ids: At most three tests (``test_losses.py::test_name[case]``, below ``tests/``) or rows of ``spo verify``
            (``verify:METHOD:MODEL:CHECK``, with ``+kl`` after the check for a row with the KL) that fail on the bug.
    """

    name: str
    function: str
    edits: tuple[tuple[str, str], ...]
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.ids) <= MAX_IDS:
            raise ValueError(f"{self.name}: name one to {MAX_IDS} tests")

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Replace the code of the function, and put it back at the end.

        The function object stays the same, so modules that imported it by name run the wrong code, too.
        """
        function = find_function(self.function)
        right = function.__code__
        function.__code__ = edited_code(function, self.edits)
        try:
            yield
        finally:
            function.__code__ = right


def mutant_of(name: str, function: str, right: str, wrong: str, *ids: str) -> Mutant:
    """Return a mutant with one edit of a function, whose name is below ``spo``."""
    return Mutant(name, f"spo.{function}", ((right, wrong),), ids)


def find_function(name: str) -> FunctionType:
    """Return the plain function behind a dotted name, without decorators."""
    found: Any = locate(name)
    if found is None:
        raise LookupError(f"there is no {name}")
    found = found.fget if isinstance(found, property) else inspect.unwrap(found)
    assert isinstance(found, FunctionType), f"{name} is not a function"
    return found


def edited_code(function: FunctionType, edits: Sequence[tuple[str, str]]) -> CodeType:
    """Compile the text of a function with replacements.

    Raises:
        LookupError: A text does not occur exactly once, because the function was changed.
    """
    source = textwrap.dedent(inspect.getsource(function))
    for right, wrong in edits:
        if source.count(right) != 1:
            raise LookupError(f"{function.__qualname__}: {right!r} occurs {source.count(right)} times, not once")
        source = source.replace(right, wrong)
    # A class around it gives methods the cell that `super()` reads.
    source = "class _Around:\n" + textwrap.indent(source, "    ")
    code = compile(source, f"<mutant of {function.__qualname__}>", "exec", dont_inherit=True, flags=_FUTURE)
    found = _search(code, function.__name__)
    assert found.co_freevars == function.__code__.co_freevars, "the wrong code reads other variables"
    return found


_FUTURE = __import__("__future__").annotations.compiler_flag


def _search(code: CodeType, name: str) -> CodeType:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            return constant if constant.co_name == name else _search(constant, name)
    raise LookupError(name)
