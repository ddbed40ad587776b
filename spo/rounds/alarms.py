"""Alarms of an iteration: a round whose completions are far longer, shorter or more alike than the first model's.

Training on a model's own completions, round after round, amplifies what its scores reward. Longer answers and less
diverse ones are the usual ways in which that goes wrong, and neither is seen in a win rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spo.metrics.rounds import Measured, RoundMetrics, round_metrics
from spo.records.iteration import Iteration, iteration_of, read_iteration
from spo.wording import number


def round_alarms(
    directory: Path,
    iteration: Iteration,
    round_number: int,
    *,
    max_length_ratio: float | None,
    min_length_ratio: float | None,
    min_diversity_ratio: float | None,
) -> list[str]:
    """Return a sentence for each limit that a round has crossed, compared with round 0.

    Args:
        directory: Directory of the iteration.
        iteration: Iteration with its rounds so far.
        round_number: Number of a round that has been evaluated.
        max_length_ratio: Largest ratio of the mean length to that of round 0; ``None`` for no limit.
        min_length_ratio: Smallest ratio of the mean length to that of round 0; ``None`` for no limit.
        min_diversity_ratio: Smallest ratio of a measure of diversity to that of round 0; ``None`` for no limit. The
            measures are distinct-2, and the share of n-grams that self-BLEU does not find again, 1 - self-BLEU.

    Returns:
        Sentences with their numbers; none for round 0, and none for what was not measured in both rounds.
    """
    if round_number == 0:
        return []
    start, now = (round_metrics(directory, iteration, one) for one in (0, round_number))
    return [
        *_of_length(start, now, max_length_ratio, min_length_ratio),
        *_of_diversity(start, now, min_diversity_ratio),
    ]


def alarms_of_run(run_dir: Path) -> list[str]:
    """Return the alarms of a round from its run directory; none for a run outside of an iteration.

    Args:
        run_dir: Run directory with ``metrics.json``. The limits are those in the settings of its iteration.
    """
    directory = iteration_of(run_dir)
    if directory is None:
        return []
    iteration, place = read_iteration(directory), run_dir.absolute().relative_to(directory).as_posix()
    limits = iteration.settings.get("limits")
    numbers = [one.number for one in iteration.rounds if one.measured == place]
    return round_alarms(directory, iteration, numbers[0], **limits) if numbers and limits else []


def _of_length(start: RoundMetrics, now: RoundMetrics, most: float | None, least: float | None) -> Iterator[str]:
    ratio = _ratio(start.length, now.length)
    if ratio is None or start.length is None or now.length is None:
        return
    words = (
        f"length: completions of round {now.number} have {number(now.length.value)} tokens on average, "
        f"{ratio:.2f} times the {number(start.length.value)} of the first model"
    )
    if most is not None and ratio > most:
        yield f"{words}; the limit is {most:g}"
    elif least is not None and ratio < least:
        yield f"{words}; the limit is {least:g}"


def _of_diversity(start: RoundMetrics, now: RoundMetrics, least: float | None) -> Iterator[str]:
    if least is None:
        return
    ratio = _ratio(start.distinct_2, now.distinct_2)
    if ratio is not None and start.distinct_2 is not None and now.distinct_2 is not None and ratio < least:
        yield (
            f"diversity: distinct-2 of round {now.number} is {number(now.distinct_2.value)}, {ratio:.2f} times the "
            f"{number(start.distinct_2.value)} of the first model; the limit is {least:g}"
        )
    ratio = _ratio(_rest(start.self_bleu), _rest(now.self_bleu))
    if ratio is not None and start.self_bleu is not None and now.self_bleu is not None and ratio < least:
        yield (
            f"diversity: 1 - self-BLEU of round {now.number} is {number(1 - now.self_bleu.value)}, {ratio:.2f} times "
            f"the {number(1 - start.self_bleu.value)} of the first model; the limit is {least:g}"
        )


def _rest(share: Measured | None) -> Measured | None:
    return None if share is None else Measured(1 - share.value)


def _ratio(start: Measured | None, now: Measured | None) -> float | None:
    """Return how many times the first number the second one is; ``None`` if either is missing or the first is 0."""
    return None if start is None or now is None or start.value <= 0 else now.value / start.value
