"""Messages in the forms that chat templates read: different ways to write the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from spo.data.rows import Message


def message_forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield messages in the forms that templates read: as they are, and others with the same meaning.

    Content may be absent, null or empty text. The arguments of a tool call may have to be JSON instead of an object.
    """
    absent = [{key: value for key, value in message.items() if value is not None} for message in messages]
    empty = [message if message.get("content") else {**message, "content": ""} for message in absent]
    null = [{**m, "content": None} if m.get("tool_calls") and not m["content"] else m for m in empty]
    forms = [form for i, form in enumerate([absent, empty, null]) if form not in [absent, empty][:i]]
    yield from forms
    for form in forms:
        changed = [_with_arguments(message, _write_json) for message in form]
        if changed != form:
            yield changed


def with_object_arguments(message: Message) -> Message:
    """Return a message in which the arguments of tool calls are objects, where they are the JSON of one."""
    return _with_arguments(message, _read_json)


def _read_json(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def _write_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _functions(message: Message) -> Iterator[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, (list, tuple)) else ():
        if isinstance(call, dict):
            function = call.get("function", call)
            yield function if isinstance(function, dict) else {}


def called_names(message: Message) -> Iterator[str]:
    """Yield the names of the tools that a message calls."""
    yield from (function["name"] for function in _functions(message) if isinstance(function.get("name"), str))


def _with_arguments(message: Message, convert: Callable[[Any], Any]) -> Message:
    """Return a message with converted arguments of its tool calls."""
    if not any("arguments" in function for function in _functions(message)):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            calls.append(call)
            continue
        function = {**function, "arguments": convert(function.get("arguments"))}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}
