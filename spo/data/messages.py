"""Messages of conversations: their checks, and what counts as empty.

All fields of a message are part of it. A chat template may read any of them.
"""

from __future__ import annotations

import json
import re
from typing import Any

from spo.data.cells import describe_type, json_value, require_utf8
from spo.data.rows import Message, RowError, Text

_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
"""Role of chat templates for each role name in lower case, those of other formats included."""
_NOT_CONTENT = ("role", "content", "name", "id", "tool_call_id")
"""Fields that do not make a message without content a message that says something."""
_PRINTED_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*'(role|content|from|value)'\s*:""")
"""Beginning of messages as Python or pandas prints them."""


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
        if _is_printed_messages(value):
            reason = f"{name} contains messages as JSON text; write them as a list of objects in jsonl or parquet"
            raise RowError(where, reason.strip(), column)
        return require_utf8(value, where, column)
    if not isinstance(value, (list, tuple)):
        hint = "; a single message also needs a list" if isinstance(value, dict) else ""
        reason = f"{name} must be text or a list of messages, not {describe_type(value)}{hint}"
        raise RowError(where, reason.strip(), column)
    try:
        return tuple(_message(item, f"{name} message {i}".strip(), where, column) for i, item in enumerate(value, 1))
    except RecursionError:
        raise RowError(where, f"{name} has messages that are nested too deeply".strip(), column) from None


def _message(item: Any, name: str, where: str, column: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(where, f"{name} must be an object with role and content, not {describe_type(item)}", column)
    if "role" not in item and {"from", "value"} <= item.keys():
        reason = (
            f"{name} has ShareGPT's keys 'from' and 'value'; rename them to 'role' and 'content', and the roles "
            "'human' and 'gpt' to 'user' and 'assistant'"
        )
        raise RowError(where, reason, column)
    # A null field is an absent one: columnar files cannot tell them apart.
    message: Message = {
        key: field for key, field in json_value(item, where, column).items() if field is not None or key == "content"
    }
    role, content = message.get("role"), message.setdefault("content", None)
    if not isinstance(role, str):
        raise RowError(where, f"{name}: 'role' must be text, not {describe_type(role)}", column)
    if (usual := _ROLES.get(role.lower(), role)) != role:
        raise RowError(where, f"{name}: write the role {role!r} as {usual!r}", column)
    if isinstance(content, list):
        for i, part in enumerate(content, 1):
            content[i - 1] = _text_part(part, f"{name}: part {i} of 'content'", where, column)
    elif not isinstance(content, str) and not (content is None and _says_something(message)):
        raise RowError(
            where, f"{name}: 'content' must be text or a list of parts, not {describe_type(content)}", column
        )
    return message


def _text_part(part: Any, name: str, where: str, column: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise RowError(where, f"{name} must be an object with type and text, not {describe_type(part)}", column)
    part = {key: field for key, field in part.items() if field is not None}
    if part.get("type") != "text":
        kind = part.get("type", "null")
        raise RowError(where, f"{name} has the type {kind!r}, and only 'text' is supported", column)
    if not isinstance(part.get("text"), str):
        raise RowError(where, f"{name}: 'text' must be text, not {describe_type(part.get('text'))}", column)
    return part


def message_text(message: Message) -> str:
    """Return the text of a message's content, of all parts together if it has several."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def is_empty(completion: Text) -> bool:
    """Return whether a completion does not say anything: white space, and no field such as ``tool_calls``."""
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message_text(message).strip() or _says_something(message) for message in completion)


def _says_something(message: Message) -> bool:
    """Return whether a field beside the content holds text, a list or an object that is not empty."""
    fields = [field for key, field in message.items() if key not in _NOT_CONTENT]
    return any(field.strip() if isinstance(field, str) else field for field in fields if not _is_number(field))


def _is_number(field: Any) -> bool:
    return isinstance(field, (bool, int, float))


def _is_printed_messages(text: str) -> bool:
    """Return whether a text is a printed list of messages, one message, or an object that holds such a list."""
    if not text.lstrip().startswith(("[", "{", '"')):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        keys = (("'role'", "'content'"), ("'from'", "'value'"))
        return _PRINTED_MESSAGES.match(text) is not None and any(one in text and two in text for one, two in keys)
    if isinstance(value, str):  # JSON text inside JSON text
        return _is_printed_messages(value)
    lists = [value, *value.values()] if isinstance(value, dict) else [value]
    return any(_holds_messages([one] if isinstance(one, dict) else one) for one in lists)


def _holds_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_printed_message, value))


def _is_printed_message(item: Any) -> bool:
    role = item.get("role", item.get("from")) if isinstance(item, dict) else None
    return isinstance(role, str) and role.lower() in _ROLES and not {"content", "value", "tool_calls"}.isdisjoint(item)
