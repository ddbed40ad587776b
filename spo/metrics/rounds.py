"""The metrics of a round, under names that do not depend on the reference of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from spo.metrics.catalogue import CHOSEN, INTERVAL_ENDS
from spo.records import filenames
from spo.records.files import read_mapping
from spo.records.iteration import Iteration, Round
from spo.wording import finite

RoundOpponent = Literal["previous", "first", "data"]
"""Opponents of a round: the policy of the round before, the first model, and the chosen responses of the data."""
ROUND_OPPONENTS: tuple[RoundOpponent, ...] = get_args(RoundOpponent)
FIRST = "first"
"""Name of the first model below ``evaluation.further_kl``, and in the key ``eval/kl/first``."""


@dataclass(frozen=True)
class Measured:
    """A number with its confidence interval.

    Attributes:
        value: Estimate, in the unit of its metric.
        low: Lower end of the interval, ``None`` without an interval.
        high: Upper end of the interval, ``None`` without an interval.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class RoundMetrics:
    """Metrics of a round on the test prompts. A quantity that was not measured is ``None`` or left out.

    Attributes:
        number: Number of the round.
        win_rates: Win rate against each opponent, as a share of prompts. In round 0, only the
            one against the data is present: against the other two it is 1/2 by definition.
        kl: KL to the reference of the round, in nats per sequence.
        kl_first: KL to the first model, in nats per sequence.
        entropy: Entropy in nats per token.
        length: Length in tokens.
        reward: Reward by the judge of the evaluation.
        distinct_2: Share of different bigrams.
        self_bleu: Self-BLEU.
    """

    number: int
    win_rates: Mapping[RoundOpponent, Measured] = field(default_factory=dict)
    kl: Measured | None = None
    kl_first: Measured | None = None
    entropy: Measured | None = None
    length: Measured | None = None
    reward: Measured | None = None
    distinct_2: Measured | None = None
    self_bleu: Measured | None = None


def round_metrics(directory: Path, iteration: Iteration, number: int) -> RoundMetrics:
    """Read the metrics that stand for a round.

    Args:
        directory: Directory of the iteration.
        iteration: Iteration as :func:`spo.records.iteration.read_iteration` returns it.
        number: Number of a round that has begun.

    Returns:
        The metrics of the run directory ``measured`` of the round; without numbers where it has not finished.

    Raises:
        KeyError: The round has not begun.
    """
    found = read_mapping(directory / iteration.round(number).measured / filenames.METRICS) or {}
    rates = {name: [_measured(found, key) for key in keys] for name, keys in win_rate_keys(iteration, number).items()}
    kl_first = "kl" if number <= 1 or iteration.reference == "first" else f"kl/{FIRST}"
    return RoundMetrics(
        number,
        {name: known[0] for name, some in rates.items() if (known := [one for one in some if one is not None])},
        kl_first=_measured(found, kl_first),
        **{name: _measured(found, name) for name in ("kl", "entropy", "length", "reward", "distinct_2", "self_bleu")},
    )


def win_rate_keys(iteration: Iteration, number: int) -> dict[RoundOpponent, list[str]]:
    """Return the keys of the win rate against each opponent of a round, without ``eval/``.

    The win rate against the reference of a round has the key ``win_rate``, and that against a run directory has the
    name of the directory too.

    Args:
        iteration: Iteration with the rounds before ``number``.
        number: Number of the round.

    Returns:
        Keys by opponent, in order of preference: the first measured one counts. An extrapolated policy is compared
        with the samples of an earlier round's extrapolated policy, or of its trained one.
    """
    data = [f"win_rate/{CHOSEN}"]
    if number == 0:
        return {"data": data}
    first = previous = ["win_rate"]
    if number > 1 and iteration.reference == "previous":
        first = _of_run(iteration.round(0))
    elif number > 1:
        previous = _of_run(iteration.round(number - 1))
    return {"previous": previous, "first": first, "data": data}


def _of_run(one: Round) -> list[str]:
    return [f"win_rate/{name}" for name in dict.fromkeys(Path(path).name for path in (one.measured, one.directory))]


def _measured(metrics: Mapping[str, Any], name: str) -> Measured | None:
    value, low, high = (finite(metrics.get(f"eval/{name}{end}")) for end in ("", *INTERVAL_ENDS))
    return None if value is None else Measured(value, low, high)
