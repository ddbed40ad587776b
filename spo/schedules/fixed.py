"""Schedules that are known before training starts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spo.bounds import NonNegativeInt, PositiveFloat
from spo.schedules.base import Schedule, positive


class Constant(Schedule):
    """The same value at every step.

    Args:
        value: Value, positive.
    """

    def __init__(self, value: PositiveFloat) -> None:
        positive(value=value)
        self.value = value

    def __call__(self, step: int) -> float:
        """Return the value."""
        return self.value


class Linear(Schedule):
    """A straight line from ``start`` to ``end`` over ``steps`` optimizer steps, then ``end``.

    Args:
        start: Value at step 0, positive.
        end: Value at the last of the steps, positive.
        steps: Number of optimizer steps.
    """

    def __init__(self, start: PositiveFloat, end: PositiveFloat, steps: NonNegativeInt) -> None:
        positive(start=start, end=end)
        self.start, self.end, self.steps = start, end, steps

    def fraction(self, step: int) -> float:
        """Return the share of the way from start to end at a step, in [0, 1]."""
        return min(step / max(self.steps - 1, 1), 1.0)

    def __call__(self, step: int) -> float:
        """Return the value at an optimizer step."""
        return self.start + self.fraction(step) * (self.end - self.start)


class Cosine(Linear):
    """Half a cosine from ``start`` to ``end``: flat at both ends. Arguments as in :class:`Linear`."""

    def fraction(self, step: int) -> float:
        """Return the share of the way from start to end at a step, in [0, 1]."""
        return (1 - math.cos(math.pi * super().fraction(step))) / 2


class PerStep(Schedule):
    """One value for each optimizer step, then the last of them.

    Args:
        values: Positive values, at least one.

    Raises:
        ValueError: ``values`` is not a list, is empty, or holds anything but positive numbers.
    """

    def __init__(self, values: Sequence[float]) -> None:
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ValueError(f"values must be a list with one number per step, such as [0.5,0.4], got {values!r}")
        positive(**{f"values[{step}]": value for step, value in enumerate(values)})
        self.values = list(values)

    def __call__(self, step: int) -> float:
        """Return the value of an optimizer step, the last one after the end of the list."""
        return self.values[min(step, len(self.values) - 1)]
