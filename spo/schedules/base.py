"""The base class of schedules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod


class Schedule(ABC):
    """A positive coefficient as a function of the optimizer step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the value at an optimizer step, counted from 0."""

    def __str__(self) -> str:
        """Return a few characters for names and tags: the value at the start."""
        return f"{self(0):g}"


def positive(**values: float) -> None:
    """Check that every value is a positive, finite number.

    Raises:
        ValueError: A value is not; the message names it.
    """
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive, finite number, got {value}")
