"""Coefficients that are adjusted while training until a measured quantity of the policy is at a target."""

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

    with c and exp(lambda) clipped to [min, max]. The relative error e lies in [-1, 1], so a measurement changes lambda
    by at most ``rate`` however far off the policy is. The term with ``gain`` is that of an augmented Lagrangian: a
    policy follows its coefficient with a delay, and dual ascent alone would swing about the target.

    Attributes:
        watches: what is measured.
        direction: 1 where a larger coefficient lowers the quantity, -1 where it raises it.

    Args:
        target: of the quantity, positive.
        start: the coefficient until the first measurement.
        rate: of the ascent: largest change of lambda per measurement.
        gain: answer to the error at hand: largest departure of log c from lambda.
        every: optimiser steps between two measurements.
        min: smallest coefficient.
        max: largest coefficient.

    Raises:
        ValueError: a number is not positive (``gain`` may be 0), or not min <= start <= max.
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
        return self.value

    def __str__(self) -> str:
        return f"target_{self.watches}-{self.target:g}"

    def observe(self, measured: float) -> None:
        """Adjusts the coefficient to a measurement of what it watches."""
        error = self.direction * min((measured - self.target) / self.target, 1.0)
        ascended = self.ascended * math.exp(self.rate * error)
        wanted = ascended * math.exp(self.gain * error)
        self.ascended, self.value = self._bounded(ascended), self._bounded(wanted)
        self.saturated = self.value != wanted

    def _bounded(self, value: float) -> float:
        return min(max(value, self.min), self.max)

    def state_dict(self) -> dict[str, float | bool]:
        """What an exact resume needs."""
        return {"value": self.value, "ascended": self.ascended, "saturated": self.saturated}

    def load_state_dict(self, state: dict[str, float | bool]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self.value, self.ascended = float(state["value"]), float(state["ascended"])
        self.saturated = bool(state["saturated"])


class TargetEntropy(Controller):
    """Keeps the policy's entropy at ``target`` nats per token: a larger coefficient makes the policy softer."""

    watches = "entropy"
    direction = -1


class TargetKL(Controller):
    """Keeps KL(policy || reference) at ``target`` nats per sequence: a larger coefficient holds the policy nearer."""

    watches = "kl"
    direction = 1
