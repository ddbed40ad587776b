"""Schedules of alpha and beta over optimiser steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod


class Schedule(ABC):
    """A positive coefficient as a function of the optimiser step."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value in force at optimiser step ``step`` (0 is the first)."""


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive, finite number, got {value}")


class Constant(Schedule):
    """The same value at every step.

    Args:
        value: positive.
    """

    def __init__(self, value: float) -> None:
        _positive(value=value)
        self.value = value

    def __call__(self, step: int) -> float:
        return self.value


class Linear(Schedule):
    """A straight line from ``start`` to ``end`` over ``steps`` optimiser steps, ``end`` from then on.

    Args:
        start: value at step 0, positive.
        end: value at the last of the ``steps``, positive.
        steps: optimiser steps.
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        _positive(start=start, end=end)
        self.start, self.end, self.steps = start, end, steps

    def fraction(self, step: int) -> float:
        """The covered share of the way from start to end, in [0, 1]."""
        return min(step / max(self.steps - 1, 1), 1.0)

    def __call__(self, step: int) -> float:
        return self.start + self.fraction(step) * (self.end - self.start)


class Cosine(Linear):
    """Half a cosine from ``start`` to ``end``: flat at both ends. Arguments as in :class:`Linear`."""

    def fraction(self, step: int) -> float:
        return (1 - math.cos(math.pi * super().fraction(step))) / 2
