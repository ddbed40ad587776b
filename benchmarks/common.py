"""Helpers that all benchmarks share: alternating rounds, ratios with their ranges, tables and result files.

Nothing here imports torch, so that a command that only supervises other processes starts at once.
"""

from __future__ import annotations

import json
import os
import random
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

Contestant = Callable[[int], float]
"""A function from the number of a round to the seconds that were measured in it."""


@dataclass(frozen=True)
class Ratio:
    """Ratios of two contestants within each round: what slows the machine down for a while slows both.

    Attributes:
        median: Median over the rounds.
        low: Smallest ratio.
        high: Largest ratio.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        """Summarize the ratios ``numerators[i] / denominators[i]`` of all rounds.

        Raises:
            ValueError: The two have different numbers of rounds, or none.
        """
        ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
        if not ratios:
            raise ValueError("a ratio needs at least one round")
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def entries(self, key: str) -> dict[str, Any]:
        """Return ``{key: median, key_range: [low, high]}``, the form of a result file."""
        return {key: self.median, f"{key}_range": [self.low, self.high]}

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def shuffled_rounds(names: Collection[str], rounds: int, seed: int = 0) -> list[tuple[int, str]]:
    """Return ``(round, name)`` for every name in every round, in an order that differs between rounds.

    Args:
        names: Names of the contestants.
        rounds: Number of rounds, at least 1.
        seed: Random seed of the order.

    Raises:
        ValueError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least 1")
    shuffle = random.Random(seed)
    return [(i, name) for i in range(rounds) for name in shuffle.sample(list(names), len(names))]


def alternate(contestants: Mapping[str, Contestant], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Measure every contestant once per round, in an order that is shuffled for each round.

    Args:
        contestants: Contestants by name, already warmed up.
        rounds: Number of rounds, at least 1.
        seed: Random seed of the order.

    Returns:
        The measurements of each contestant, round by round.

    Raises:
        ValueError: ``rounds`` is below 1.
    """
    order = shuffled_rounds(contestants, rounds, seed)
    measured = {name: [0.0] * rounds for name in contestants}
    for i, name in track(order, f"{rounds} rounds", transient=True, console=Console(stderr=True)):
        measured[name][i] = contestants[name](i)
    return measured


def write_json(path: str | Path | None, result: Mapping[str, Any]) -> None:
    """Write a result if a path is given; a reader never sees half a file."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, path)


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table with numbers to three digits."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(table)
