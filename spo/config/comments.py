"""Comments of yaml files, which describe keys."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml


def comment_of(name: yaml.Node, value: yaml.Node, text: str) -> str:
    """Return the comment behind a value, behind the key of a block, or on the line above the key.

    Args:
        name: Node of the key.
        value: Node of its value.
        text: Text of the file.
    """
    lines = text.splitlines()
    is_block = is_literal(value) or (isinstance(value, yaml.CollectionNode) and not value.flow_style)
    mark = name.end_mark if is_block else value.end_mark
    behind = re.search(r"#\s*(.*)$", lines[mark.line][mark.column :]) if mark.line < len(lines) else None
    if behind:
        return behind[1]
    above = lines[name.start_mark.line - 1].strip() if name.start_mark.line else ""
    is_leading = all(line.startswith("#") for line in lines[: name.start_mark.line])
    return above.lstrip("# ") if above.startswith("#") and not is_leading else ""


def is_literal(value: yaml.Node) -> bool:
    """Return whether a value is text in lines of its own."""
    return isinstance(value, yaml.ScalarNode) and value.style in ("|", ">")


def comments_of(text: str) -> dict[str, str]:
    """Return the comments of the keys of a yaml file, by dotted key; keys without one are left out."""
    return {key: comment for key, comment in _comments(yaml.compose(text), text, "") if comment}


def _comments(node: yaml.Node | None, text: str, prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        key = f"{prefix}{name.value}"
        yield key, comment_of(name, value, text)
        yield from _comments(value, text, f"{key}.")
