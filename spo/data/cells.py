"""Checks of the values in a record's columns, and lengths of the beginnings that two values share."""

from __future__ import annotations

from typing import Any

from spo.data.rows import Message, RowError, Text


def text_or_messages(value: Any, where: str, column: str, name: str = "") -> Text:
    """Return a value as text or a tuple of messages.

    Args:
        value: Value of a column, or an item of its list.
        where: Place of the record for messages, such as file and line.
        column: Name of the column.
        name: Name of the item in a column of lists, such as ``response 2``.

    Raises:
        RowError: If the value is neither text nor a list of messages, or if it is not UTF-8.
    """
    if isinstance(value, str):
        return _require_utf8(value, where, column)
    if not isinstance(value, (list, tuple)):
        raise RowError(where, f"{name} must be text or a list of messages, not {describe_type(value)}".strip(), column)
    return tuple(_message(item, i, where, column) for i, item in enumerate(value, 1))


def _require_utf8(text: str, where: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(where, f"not UTF-8 at character {error.start + 1}", column) from None
    return text


def _message(item: Any, number: int, where: str, column: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(
            where, f"message {number} must be an object with role and content, not {describe_type(item)}", column
        )
    for key in ("role", "content"):
        if not isinstance(item.get(key), str):
            raise RowError(where, f"message {number}: {key!r} must be text, not {describe_type(item.get(key))}", column)
    return {key: _require_utf8(item[key], where, column) for key in ("role", "content")}


def is_empty(completion: Text) -> bool:
    """Return whether a completion consists of white space only."""
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message["content"].strip() for message in completion)


def describe_type(value: Any) -> str:
    """Return the name of a value's type for messages."""
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def shared_prompt_length(chosen: str, rejected: str) -> int:
    """Return the length of the prompt that two whole texts share, without splitting a word.

    A space after the prompt belongs to the completions: ``"The sky is" + " blue"``. Tokenizers merge a space into the
    word that follows it.
    """
    cut = common_prefix_length(chosen, rejected)
    if chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace():
        return cut
    # At least one character is left to each completion.
    cut = min(cut, len(chosen) - 1, len(rejected) - 1)
    while cut > 0 and not chosen[cut - 1].isspace():
        cut -= 1
    return cut - 1 if cut > 0 and chosen[cut - 1] == " " else max(cut, 0)


def common_prefix_length(first: str, second: str) -> int:
    """Return the number of leading characters that two texts share."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def count_shared_messages(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """Return the number of leading messages that two conversations share, with at least one left to each."""
    cut = 0
    while cut < min(len(chosen), len(rejected)) - 1 and chosen[cut] == rejected[cut]:
        cut += 1
    return cut
