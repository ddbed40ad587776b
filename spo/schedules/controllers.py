"""Coefficients that training adjusts until a measured quantity of the policy reaches a target."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from spo.bounds import NonNegativeFloat, PositiveFloat, PositiveInt
from spo.schedules.base import Schedule, positive


class Controller(Schedule):
    r"""Dual ascent on the logarithm of a coefficient c, for the constraint m = target on a measured quantity m >= 0.

    .. math::
        e = direction \cdot \min\big((m - target) / target,\; 1\big), \qquad
        \lambda \leftarrow \lambda + rate \cdot e, \qquad
        c = \exp(\lambda + gain \cdot e)

    where c and exp(lambda) are clipped to [min, max]. The relative error e is in [-1, 1], so a measurement changes
    lambda by at most ``rate``, however far off the policy is. The term with ``gain`` is that of an augmented
    Lagrangian: a policy follows its coefficient with a delay, so dual ascent alone would oscillate.

    Attributes:
        watches: Quantity that is measured.
        direction: 1 if a larger coefficient lowers the quantity, -1 if it raises it.

    Args:
        target: Target of the quantity, positive.
        start: Coefficient until the first measurement.
        rate: Largest change of lambda per measurement.
        gain: Largest difference of log c from lambda, the direct response to the current error.
        every: Optimizer steps between two measurements.
        min: Smallest coefficient.
        max: Largest coefficient.

    Raises:
        ValueError: A number is not positive (``gain`` may be 0), or min <= start <= max does not hold.
    """

    watches: ClassVar[Literal["entropy", "kl"]]
    direction: ClassVar[Literal[-1, 1]]

    def __init__(
        self,
        target: PositiveFloat,
        start: PositiveFloat,
        rate: PositiveFloat,
        gain: NonNegativeFloat,
        every: PositiveInt,
        min: PositiveFloat,
        max: PositiveFloat,
    ) -> None:
        positive(target=target, start=start, rate=rate, every=every, min=min, max=max)
        if not 0 <= gain < math.inf:
            raise ValueError(f"gain must be a finite number >= 0, got {gain}")
        if not min <= start <= max:
            raise ValueError(f"start={start:g} must lie between the bounds min={min:g} and max={max:g}")
        self.target, self.rate, self.gain, self.every, self.min, self.max = target, rate, gain, every, min, max
        self.value = self.ascended = float(start)
        self.saturated = False

    def __call__(self, step: int) -> float:
        """Return the current coefficient, whatever the step."""
        return self.value

    def __str__(self) -> str:
        """Return a few characters for names and tags: the quantity and its target."""
        return f"target_{self.watches}-{self.target:g}"

    def observe(self, measured: float) -> None:
        """Adjust the coefficient by a measurement of the watched quantity."""
        error = self.direction * min((measured - self.target) / self.target, 1.0)
        ascended = self.ascended * math.exp(self.rate * error)
        unclipped = ascended * math.exp(self.gain * error)
        self.ascended, self.value = self._clip(ascended), self._clip(unclipped)
        self.saturated = self.value != unclipped

    def _clip(self, value: float) -> float:
        return min(max(value, self.min), self.max)

    def state_dict(self) -> dict[str, float | bool]:
        """Return what an exact resume needs."""
        return {"value": self.value, "ascended": self.ascended, "saturated": self.saturated}

    def load_state_dict(self, state: dict[str, float | bool]) -> None:
        """Restore a state that :meth:`state_dict` returned."""
        self.value, self.ascended = float(state["value"]), float(state["ascended"])
        self.saturated = bool(state["saturated"])


class TargetEntropy(Controller):
    """Controller of the policy's entropy, in nats per token: a larger coefficient makes the policy softer."""

    watches = "entropy"
    direction = -1


class TargetKL(Controller):
    """Controller of KL(policy || reference), in nats per sequence: a larger coefficient lowers it."""

    watches = "kl"
    direction = 1
