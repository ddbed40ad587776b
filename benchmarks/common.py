"""What the benchmarks share: alternating rounds, ratios with their ranges, and how a result is shown and kept."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

Contestant = Callable[[int], float]
"""From the number of a round to what was measured in it, in seconds."""


@dataclass(frozen=True)
class Ratio:
    """Ratios of two contestants within each round: what slows the machine down for a while slows both.

    Attributes:
        median: over the rounds.
        low: the smallest.
        high: the largest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        """The ratio of each round, ``numerators[i] / denominators[i]``, summed up.

        Raises:
            ValueError: the two have different numbers of rounds, or none.
        """
        ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
        if not ratios:
            raise ValueError("a ratio needs at least one round")
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def entries(self, key: str) -> dict[str, Any]:
        """``{key: median, key_range: [low, high]}``, as a result file holds it."""
        return {key: self.median, f"{key}_range": [self.low, self.high]}

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def alternate(contestants: Mapping[str, Contestant], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Measures every contestant once per round, in an order that is shuffled anew for each round.

    Args:
        contestants: by name; warmed up already.
        rounds: at least 1.
        seed: of the order.

    Returns:
        What each contestant returned, round by round.

    Raises:
        ValueError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least 1")
    shuffle, measured = random.Random(seed), {name: [0.0] * rounds for name in contestants}
    order = [(i, name) for i in range(rounds) for name in shuffle.sample(list(contestants), len(contestants))]
    for i, name in track(order, f"{rounds} rounds", transient=True, console=Console(stderr=True)):
        measured[name][i] = contestants[name](i)
    return measured


def environment() -> dict[str, Any]:
    """Versions and hardware that a measurement depends on; call it once threads are set."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        **{name: installed(name) for name in ("torch", "transformers", "lightning", "trl")},
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def write_json(path: str | Path | None, result: Mapping[str, Any]) -> None:
    """Writes a result where a path is given."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=2) + "\n")


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table, the numbers to three digits."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(table)
