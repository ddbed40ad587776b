"""Checks of the values in a record's columns: text that is UTF-8, and JSON values such as tools."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

from spo.data.rows import RowError

LARGEST_NUMBER = float(2**128 - 2**104)
"""Largest number that float32, the type of the numbers in a batch, can hold."""
RESERVED_KWARGS = frozenset(
    ("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "conversations", "messages",
     "return_assistant_tokens_mask", "return_dict", "tokenize", "tools")
)  # fmt: skip
"""Arguments of a chat template that follow from the row and its place in training."""


def describe_type(value: Any) -> str:
    """Return the name of a value's type for messages."""
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def number_cell(value: Any, where: str, column: str, lowest: float = -math.inf, highest: float = math.inf) -> float:
    """Return a finite number that float32 can hold.

    Args:
        value: Value of a column, or an item of its list.
        where: Place of the record for messages, such as file and line.
        column: Name of the column.
        lowest: Smallest allowed number.
        highest: Largest allowed number.

    Raises:
        RowError: If the value is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(where, f"must be a number, not {describe_type(value)}", column)
    # The comparison is negated because NaN fails every comparison.
    if not lowest <= value <= highest or value in (math.inf, -math.inf):
        words = {(0.0, 1.0): "between 0 and 1", (0.0, math.inf): "finite and not negative"}
        allowed = words.get((lowest, highest), "finite")
        raise RowError(where, f"must be {allowed}, not {value}", column)
    if abs(value) > LARGEST_NUMBER:
        raise RowError(where, f"must be at most {LARGEST_NUMBER:.2g} in size, which is the limit of float32", column)
    return float(value)


def require_utf8(text: str, where: str, column: str) -> str:
    """Return a text that UTF-8 can encode.

    Raises:
        RowError: If the text contains a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(where, f"not UTF-8 at character {error.start + 1}", column) from None
    return text


def json_value(value: Any, where: str, column: str) -> Any:
    """Return a copy of a value that consists of JSON's types only; dates become text in ISO format.

    Args:
        value: Value of a column, or a part of it.
        where: Place of the record for messages, such as file and line.
        column: Name of the column.

    Raises:
        RowError: If JSON cannot express the value, or if a text is not UTF-8.
    """
    if isinstance(value, str):
        return require_utf8(value, where, column)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, dict):
        return {json_value(str(key), where, column): json_value(item, where, column) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item, where, column) for item in value]
    raise RowError(where, f"contains a value of the type {describe_type(value)}, which JSON does not have", column)


def json_cell(value: Any, where: str, column: str) -> Any:
    """Return a JSON value that a column holds as it is or as JSON text; white space is ``None``.

    Raises:
        RowError: If a text is not JSON, or if JSON cannot express the value.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(where, f"not valid JSON: {error}", column) from None
    return json_value(value, where, column)


def tool_list(value: Any, where: str, column: str) -> tuple[dict[str, Any], ...] | None:
    """Return the tools of a row, ``None`` for none.

    Args:
        value: List of objects, or JSON text of such a list or of its items.
        where: Place of the record for messages, such as file and line.
        column: Name of the column.

    Raises:
        RowError: If the value is something else.
    """
    tools = json_cell(value, where, column)
    if isinstance(tools, list):
        tools = [json_cell(tool, where, column) for tool in tools]
    if not tools and (tools is None or isinstance(tools, list)):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        item = next((tool for tool in tools if not isinstance(tool, dict)), None) if isinstance(tools, list) else tools
        within = " with " if isinstance(tools, list) else " "
        raise RowError(where, f"must be a list of objects, one for each tool, not{within}{describe_type(item)}", column)
    return tuple(tools)


def template_kwargs(value: Any, where: str, column: str) -> dict[str, Any] | None:
    """Return the arguments of the chat template that a row sets, ``None`` for none.

    Args:
        value: Object, or JSON text of one.
        where: Place of the record for messages, such as file and line.
        column: Name of the column.

    Raises:
        RowError: If the value is something else, or if it has a key of :data:`RESERVED_KWARGS`.
    """
    kwargs = json_cell(value, where, column)
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RowError(where, f"must be an object, not {describe_type(kwargs)}", column)
    if reserved := sorted(RESERVED_KWARGS.intersection(kwargs or ())):
        raise RowError(where, f"{reserved[0]!r} is not a choice of the data; remove it", column)
    return kwargs or None


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its objects, at any depth.

    Columnar files give every object of a column the same fields, and null where a field was absent.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
