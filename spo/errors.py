"""The error that is a message to a person."""

from __future__ import annotations


class UserError(Exception):
    """Something the person who typed the command can put right. The message says what, where and how."""
