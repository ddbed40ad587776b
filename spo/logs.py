"""Log messages that a run shows once."""

from __future__ import annotations

import logging
from functools import cache


@cache
def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log a message the first time, and skip it when a later stage of the run finds the same."""
    logger.log(level, message)
