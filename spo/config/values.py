"""Judging a value by the type of what it is for, the bounds of that type included."""

from __future__ import annotations

import math
import operator
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt
from omegaconf import DictConfig, ListConfig

from spo.config.nodes import listed
from spo.wording import suggestion

# For each kind of bound: its number, the comparison that a value has to pass, and its words.
_BOUNDS: dict[type, tuple[str, Callable[[Any, Any], bool], str]] = {
    Ge: ("ge", operator.ge, "at least"),
    Gt: ("gt", operator.gt, "above"),
    Le: ("le", operator.le, "at most"),
    Lt: ("lt", operator.lt, "below"),
}


@dataclass(frozen=True)
class Advice:
    """A sentence for people, to annotate a type with; it follows the message about a wrong value."""

    text: str


def violation(value: Any, hint: Any) -> str | None:
    """Return what is wrong with a value of the configuration, such as ``must be at least 1``.

    Numbers, booleans, choices, lists and mappings are judged; a type of another kind accepts every value.

    Args:
        value: Resolved value.
        hint: Type of what the value is for, with its bounds.

    Returns:
        What the value must be; ``None`` for a value that fits.
    """
    options = list(_alternatives(hint))
    if any(_accepts(kind, metadata, value) for kind, metadata in options):
        return None
    choices = list(map(str, choices_of(hint)))
    words = [_words(kind, metadata, value) for kind, metadata in options if not _choices(kind)]
    advice = "".join(f"; {note.text}" for note in _advice(hint))
    if choices and set(words) <= {"null"}:
        return f"choose {listed([*choices, *words])}{suggestion(str(value), choices)}{advice}"
    return f"must be {', or '.join([*words, *choices])}{advice}"


def choices_of(hint: Any) -> list[Any]:
    """Return the values of every ``Literal`` in a type, in order."""
    return [choice for kind, _ in _alternatives(hint) for choice in _choices(kind)]


def _alternatives(hint: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the members of a union, each with the bounds that hold for it."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *more = typing.get_args(hint)
        flat = [one for item in more for one in (item if isinstance(item, GroupedMetadata) else [item])]
        yield from _alternatives(inner, (*metadata, *flat))
    elif origin in (Union, UnionType):
        for member in typing.get_args(hint):
            yield from _alternatives(member, metadata)
    else:
        yield hint, metadata


def _advice(hint: Any) -> list[Advice]:
    return [one for _, metadata in _alternatives(hint) for one in metadata if isinstance(one, Advice)]


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _accepts(kind: Any, metadata: tuple[Any, ...], value: Any) -> bool:
    if kind in (None, NoneType):
        return value is None
    if choices := _choices(kind):
        # YAML reads 32 as a number, where a choice may be "32".
        return not isinstance(value, bool) and str(value) in map(str, choices)
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return is_number and all(_holds(bound, value) for bound in metadata)
    if kind is str:
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    container = typing.get_origin(kind) or kind
    if isinstance(container, type) and issubclass(container, Mapping):
        return isinstance(value, Mapping | DictConfig)
    if isinstance(container, type) and issubclass(container, Sequence):
        return isinstance(value, list | tuple | ListConfig)
    # Values of any other class are accepted. None is accepted only if the type includes it.
    return value is not None or not isinstance(kind, type) or kind in (object, Any)


def _holds(bound: Any, value: float) -> bool:
    if type(bound) not in _BOUNDS:
        return True
    name, compare, _ = _BOUNDS[type(bound)]
    return compare(value, getattr(bound, name))


def _words(kind: Any, metadata: tuple[Any, ...], value: Any) -> str:
    if kind in (None, NoneType):
        return "null"
    if kind is bool:
        return "true or false"
    if kind not in (int, float):
        return "a text" if kind is str else _container_words(typing.get_origin(kind) or kind)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int and not (is_number and isinstance(value, int)):
        return "a whole number"
    if isinstance(value, float) and not math.isfinite(value):  # A long integer does not fit into a float.
        return "a finite number"
    limits = " and ".join(_limits(metadata))
    if limits == "above 0":
        return "a positive number"
    return limits if is_number and limits else f"a number, {limits}" if limits else "a number"


def _limits(metadata: tuple[Any, ...]) -> Iterator[str]:
    """Yield the bounds as words, such as ``at least 1``; infinite ones say nothing to a person."""
    for bound in metadata:
        if type(bound) in _BOUNDS:
            name, _, words = _BOUNDS[type(bound)]
            if math.isfinite(number := getattr(bound, name)):
                yield f"{words} {number}" if isinstance(number, int) else f"{words} {number:g}"


def _container_words(container: type) -> str:
    if issubclass(container, Mapping):
        return "a mapping"
    return "a list, written [..]" if issubclass(container, Sequence) else f"a {container.__name__}"
