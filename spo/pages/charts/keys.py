"""Axes for the values of a configuration key: numbers on a scale, all other values in lanes of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spo.pages.charts.axes import nice_ticks, stretched_ticks, tick_text
from spo.wording import value_text

# Value of a setting that does not have the key.
NOT_SET = "not set"
# Share of the axis for each lane beside numbers, for all of them at most, and between them and the numbers.
_LANE, _ALL_LANES, _LANE_GAP = 0.13, 0.45, 0.05
# Room between the outermost numbers and the ends of the axis.
_PADDING = 0.04
# An axis with at most this many numbers has a tick for each of them.
_MAX_OWN_TICKS = 8
# Ratio of the ends from which numbers may have a logarithmic axis, and from which a few numbers always have one.
_MIN_RATIO, _LARGE_RATIO, _FEW = 3.0, 10.0, 4
# Place of the middle between the geometric mean of the ends (0) and the arithmetic one (1) up to which it is geometric.
_GEOMETRIC = 0.6


@dataclass(frozen=True)
class KeyAxis:
    """An axis for the values of a key.

    Attributes:
        name: Name of the axis.
        numbers: Different numbers among the values, in increasing order.
        logarithmic: Whether equal ratios of numbers have equal distances.
        lanes: Texts of the other values, in the order of their places.
    """

    name: str
    numbers: tuple[float, ...]
    logarithmic: bool = False
    lanes: tuple[str, ...] = ()

    @property
    def start(self) -> float:
        """Return the place where the numbers begin, behind the lanes."""
        return min(_LANE * len(self.lanes), _ALL_LANES) + _LANE_GAP if self.lanes else 0.0

    def place(self, value: Any) -> float:
        """Return the place of a value on the axis, from 0 to 1."""
        if not is_number(value):
            width = (self.start - _LANE_GAP if self.numbers else 1.0) / len(self.lanes)
            return width * (self.lanes.index(value_text(value)) + 0.5)
        low, high = (self._scaled(self.numbers[end]) for end in (0, -1))
        share = (self._scaled(value) - low) / (high - low) if high > low else 0.5
        return self.start + (1 - self.start) * (_PADDING + share * (1 - 2 * _PADDING))

    def ticks(self, gap: float) -> list[tuple[float, str]]:
        """Return places and texts of ticks.

        Args:
            gap: Smallest distance between two ticks of numbers, as a share of the axis.
        """
        lanes = [(self.place(lane), lane) for lane in self.lanes]
        if not self.numbers:
            return lanes
        low, high = self.numbers[0], self.numbers[-1]
        if len(self.numbers) <= _MAX_OWN_TICKS:
            kept: list[float] = []
            for number in self.numbers:
                if not kept or self.place(number) - self.place(kept[-1]) >= gap:
                    kept.append(number)
            return lanes + [(self.place(number), value_text(number)) for number in kept]
        if self.logarithmic:
            round_numbers = stretched_ticks(low, high, self.place, gap)
            return lanes + [(self.place(number), value_text(number)) for number in round_numbers]
        even = nice_ticks(low, high, max(2, min(6, int((1 - self.start) / gap))))
        step = even[1] - even[0] if len(even) > 1 else 0.0
        return lanes + [(self.place(number), tick_text(number, step)) for number in even]

    def _scaled(self, number: float) -> float:
        return math.log10(number) if self.logarithmic else number


def key_axis(name: str, values: Sequence[Any]) -> KeyAxis:
    """Make the axis of a key from its values, at least one.

    Args:
        name: Name of the axis.
        values: One value per setting: numbers, names, ``None``, or ``NOT_SET``.
    """
    numbers = sorted({float(value) for value in values if is_number(value)})
    names = {value_text(value) for value in values if not is_number(value)}
    # Settings without the key come first, at the beginning of the axis.
    lanes = sorted(names, key=lambda lane: (lane != NOT_SET, lane))
    return KeyAxis(name, tuple(numbers), spreads_by_ratio(numbers), tuple(lanes))


def is_number(value: Any) -> bool:
    """Return whether a value has a place on a scale."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def spreads_by_ratio(numbers: Sequence[float]) -> bool:
    """Return whether numbers are better told apart by their ratios than by their differences.

    This is so for positive numbers of different sizes whose median is near the geometric mean of their ends, as in a
    search on a logarithmic scale, and not near the arithmetic one. The median of a few numbers does not tell: these are
    told apart by ratios if they span a power of ten.

    Args:
        numbers: Different numbers in increasing order.
    """
    if len(numbers) < 2 or numbers[0] <= 0:
        return False
    low, high = numbers[0], numbers[-1]
    if high < _MIN_RATIO * low:
        return False
    middle = (numbers[(len(numbers) - 1) // 2] + numbers[len(numbers) // 2]) / 2
    geometric, arithmetic = math.sqrt(low * high), (low + high) / 2
    few = len(numbers) <= _FEW and high >= _LARGE_RATIO * low
    return few or middle <= geometric + _GEOMETRIC * (arithmetic - geometric)
