"""Secrets such as API keys: which keys and variables hold them, and every text that leaves the process without them.

A secret is the value of an environment variable whose name says so, of a configuration key whose name says so, and of
a variable that such a key or ``judge.key_variable`` reads. :func:`scrub` replaces these values. Files, the terminal,
log messages, and trackers receive scrubbed texts only.
"""

from __future__ import annotations

import html
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

REDACTED = "<redacted>"
MIN_SECRET_CHARACTERS = 6
"""Length of the shortest value that is replaced: shorter ones occur in ordinary texts."""

_SECRET_KEY = re.compile(
    r"api[_-]?key|(access|private|secret|subscription|signing|auth)[_-]?key|pass(word|wd|phrase)|secret|credential"
    r"|authorization|cookie|(^|\.)token$|(access|auth|bearer|hub|hf|id|refresh|session|wandb)[_-]?token"
    # Any header may hold a key. These never do.
    r"|headers\.(?!(content-type|content-length|accept|accept-encoding|accept-language|host|user-agent)$)",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"API_?KEY|TOKEN(?!IZ)|PASSW(OR)?D|PASSPHRASE|SECRET|CREDENTIAL"
    r"|(^|_)(KEY|PASS|AUTH|AUTHORIZATION|BEARER|COOKIE|JWT|DSN)(_|$)",
    re.IGNORECASE,
)
_READS_VARIABLE = re.compile(r"oc\.env\s*:\s*(\w+)")
# A key and its value inside a mapping of an override, such as `judge.request={headers:{Authorization:'Bearer x'}}`.
_IN_MAPPING = re.compile(
    r"""(?<!\$\{)(?<![\w.-])(?P<key>['"]?[\w.-]+['"]?\s*:\s*)(?P<value>"[^"]*"|'[^']*'|[^,{}\[\]'"]+)"""
)
_remembered: set[str] = set()


# --- names ---------------------------------------------------------------------------------------------------------


def is_secret_key(key: str) -> bool:
    """Return whether a configuration key names a secret.

    Args:
        key: Dotted key.
    """
    return _SECRET_KEY.search(key) is not None


def reads_secret_variable(text: str) -> bool:
    """Return whether an interpolation reads a secret from the environment, such as ``${oc.env:HF_TOKEN}``."""
    return any(_SECRET_VARIABLE.search(name) for name in _READS_VARIABLE.findall(text))


def redact(node: Any, key: str = "") -> Any:
    """Return unresolved configuration values with secrets replaced; interpolations stay, since they hold none.

    Args:
        node: Nested dictionaries and lists.
        key: Dotted key of the node.
    """
    if isinstance(node, dict):
        return {name: redact(value, f"{key}.{name}" if key else str(name)) for name, value in node.items()}
    if isinstance(node, list):
        return [redact(value, key) for value in node]
    return REDACTED if isinstance(node, str) and node and "${" not in node and is_secret_key(key) else node


def command_line(argv: Sequence[str]) -> str:
    """Return the command as it was typed, with secrets replaced."""
    words = [Path(argv[0]).name if argv else "", *argv[1:]]
    if words[0] == "__main__.py":
        words[0] = "python -m spo"
    return " ".join(without_secrets(words))


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return the words of a command line, with secrets replaced."""
    return [scrub(redact_override(word)) for word in words]


def redact_override(word: str) -> str:
    """Return an override with the secrets that its keys name replaced; every other word stays as it is."""
    key, equals, value = word.partition("=")
    if not equals:
        return word
    if is_secret_key(key) and "${" not in value:
        return f"{key}={REDACTED}"

    around = f"{key}.headers" if "headers" in value else key

    def redacted(found: re.Match[str]) -> str:
        name = found["key"].rstrip(": ").strip("'\"")
        holds_secret = is_secret_key(f"{around}.{name}") and "${" not in found["value"]
        return f"{found['key']}{REDACTED}" if holds_secret else found[0]

    return f"{key}={_IN_MAPPING.sub(redacted, value)}" if "{" in value else word


# --- values --------------------------------------------------------------------------------------------------------


def remember(value: str | None) -> None:
    """Remember a secret, so that :func:`scrub` replaces it, whole or without the word before it (``Bearer``)."""
    if value:
        _remembered.update(word for word in (value, *value.split()) if len(word) >= MIN_SECRET_CHARACTERS)


def remember_secrets(node: Any, key: str = "") -> None:
    """Remember the secrets that a configuration names.

    Args:
        node: Unresolved configuration as nested dictionaries and lists.
        key: Dotted key of the node.
    """
    if isinstance(node, Mapping):
        for name, value in node.items():
            remember_secrets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            remember_secrets(value, key)
    elif isinstance(node, str) and is_secret_key(key):
        variables = _READS_VARIABLE.findall(node)
        for value in map(os.environ.get, variables) if variables else [node]:
            if value != REDACTED and "${" not in str(value):
                remember(value)
    elif isinstance(node, str) and key.endswith(".key_variable"):
        remember(os.environ.get(node))


def scrub(text: str) -> str:
    """Return a text without secrets: each becomes ``<redacted>``, in JSON, HTML and addresses too."""
    for value in _secrets():
        for form in {value, json.dumps(value)[1:-1], repr(value)[1:-1], html.escape(value), quote(value, safe="")}:
            text = text.replace(form, REDACTED)
    return text


def scrubbed(node: Any) -> Any:
    """Return nested dictionaries and lists with every text scrubbed; the keys of dictionaries stay."""
    if isinstance(node, Mapping):
        return {name: scrubbed(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [scrubbed(value) for value in node]
    return scrub(node) if isinstance(node, str) else node


def _secrets() -> list[str]:
    """Return every known secret, the longest first, since one may contain another."""
    named = {
        value
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name) and len(value) >= MIN_SECRET_CHARACTERS and not _is_harmless(value)
    }
    return sorted(named | _remembered, key=len, reverse=True)


def _is_harmless(value: str) -> bool:
    """Return whether a value is a path that exists or a count (``MAX_TOKENS``), whatever its name says."""
    return (value.isdigit() and len(value) < 10) or ("/" in value and os.path.exists(value))


# --- streams and logs ----------------------------------------------------------------------------------------------


class ScrubbedStream:
    """Text stream that writes to another one without secrets.

    Args:
        stream: Stream that receives the texts.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text without secrets, and return its length."""
        self._stream.write(scrub(text))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        """Write several texts without secrets."""
        for line in lines:
            self.write(line)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _ScrubbedRecord(logging.LogRecord):
    """Log message without secrets, whichever handler writes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.exc_info, tuple) and self.exc_info[0] is not None:
            self.exc_text = scrub("".join(traceback.format_exception(*self.exc_info))).rstrip("\n")

    def getMessage(self) -> str:
        """Return the message without secrets."""
        return scrub(super().getMessage())


def scrub_logs() -> None:
    """Make every log message of this process a scrubbed one."""
    logging.setLogRecordFactory(_ScrubbedRecord)


def scrub_output() -> Callable[[], None]:
    """Scrub everything that this process prints and logs from now on, and return a function that ends it."""
    before, factory = (sys.stdout, sys.stderr), logging.getLogRecordFactory()

    def end() -> None:
        sys.stdout, sys.stderr = before
        logging.setLogRecordFactory(factory)

    sys.stdout, sys.stderr = ScrubbedStream(sys.stdout), ScrubbedStream(sys.stderr)
    scrub_logs()
    return end
