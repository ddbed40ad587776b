"""Secrets such as API keys: which keys and variables hold them, and text without them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REDACTED = "<redacted>"
_SECRET_KEY = re.compile(
    r"api_?key|passw(or)?d|secret|credential|^token$|\.token$|(access|auth|bearer|hub|hf|wandb)_?token", re.IGNORECASE
)
_SECRET_VARIABLE = re.compile(r"oc\.env:\s*\w*(API_?KEY|TOKEN|PASSW(OR)?D|SECRET|CREDENTIAL)", re.IGNORECASE)


def is_secret_key(key: str) -> bool:
    """Return whether a configuration key names a secret."""
    return _SECRET_KEY.search(key) is not None


def reads_secret_variable(text: str) -> bool:
    """Return whether an interpolation reads a secret from the environment, such as ``${oc.env:HF_TOKEN}``."""
    return _SECRET_VARIABLE.search(text) is not None


def redact(node: Any, key: str = "") -> Any:
    """Return unresolved configuration values with secrets replaced; interpolations stay, since they hold none.

    Args:
        node: Nested dictionaries and lists.
        key: Key of the node in its dictionary.
    """
    if isinstance(node, dict):
        return {name: redact(value, str(name)) for name, value in node.items()}
    if isinstance(node, list):
        return [redact(value) for value in node]
    return REDACTED if isinstance(node, str) and node and "${" not in node and is_secret_key(key) else node


def command_line(argv: Sequence[str]) -> str:
    """Return the command as it was typed, with secrets replaced."""
    words = [Path(argv[0]).name if argv else "", *argv[1:]]
    if words[0] == "__main__.py":
        words[0] = "python -m spo"
    return " ".join(_redact_word(word) for word in words)


def _redact_word(word: str) -> str:
    key, equals, _ = word.partition("=")
    return f"{key}={REDACTED}" if equals and is_secret_key(key) else word
