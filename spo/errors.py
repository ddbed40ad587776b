"""The errors that are a message to a person."""

from __future__ import annotations


class UserError(Exception):
    """Something the person who typed the command can put right. The message says what, where and how."""


class JudgeError(RuntimeError):
    """A judge cannot do its work; the message says why and what to do."""
