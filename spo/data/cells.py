"""Checks the values of a record: text, lists of messages, and where two texts part."""

from __future__ import annotations

from typing import Any

from spo.data.rows import Message, RowError, Text


def text_or_messages(value: Any, where: str, column: str, name: str = "") -> Text:
    """Text or messages; ``name`` says which item of the column it is."""
    if isinstance(value, str):
        return _checked(value, where, column)
    if not isinstance(value, (list, tuple)):
        raise RowError(where, f"{name} must be text or a list of messages, not {kind_of(value)}".strip(), column)
    return tuple(_message(item, i, where, column) for i, item in enumerate(value, 1))


def _checked(text: str, where: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(where, f"not UTF-8 at character {error.start + 1}", column) from None
    return text


def _message(item: Any, number: int, where: str, column: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(where, f"message {number} must be an object with role and content, not {kind_of(item)}", column)
    for key in ("role", "content"):
        if not isinstance(item.get(key), str):
            raise RowError(where, f"message {number}: {key!r} must be text, not {kind_of(item.get(key))}", column)
    return {key: _checked(item[key], where, column) for key in ("role", "content")}


def is_empty(completion: Text) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message["content"].strip() for message in completion)


def kind_of(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def shared_text(chosen: str, rejected: str) -> int:
    """Where two texts that begin alike may be cut without splitting a word; a space goes to the completions.

    Tokenizers merge a space into the word that follows it, so ``"The sky is" + " blue"`` is cut as written.
    """
    cut = common_prefix_length(chosen, rejected)
    if chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace():
        return cut
    cut = min(cut, len(chosen) - 1, len(rejected) - 1)
    while cut > 0 and not chosen[cut - 1].isspace():
        cut -= 1
    return cut - 1 if cut > 0 and chosen[cut - 1] == " " else max(cut, 0)


def common_prefix_length(first: str, second: str) -> int:
    """How many leading characters two texts share."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def shared_messages(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """How many leading messages two conversations share, leaving at least one to each."""
    cut = 0
    while cut < min(len(chosen), len(rejected)) - 1 and chosen[cut] == rejected[cut]:
        cut += 1
    return cut
