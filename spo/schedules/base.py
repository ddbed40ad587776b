"""What every schedule is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod


class Schedule(ABC):
    """A positive coefficient as a function of the optimiser step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value in force at optimiser step ``step`` (0 is the first)."""

    def __str__(self) -> str:
        """A few characters for names and tags: the value at the start."""
        return f"{self(0):g}"


def positive(**values: float) -> None:
    """Raises :class:`ValueError` in words unless every value is a positive, finite number."""
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive, finite number, got {value}")
