"""Iterations made of files alone, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spo.records.iteration import Iteration, Round, RoundStatus, write_iteration


def with_interval(key: str, value: float, half: float) -> dict[str, float]:
    """Return a metric and its interval under their keys."""
    return {key: value, f"{key}_ci_low": value - half, f"{key}_ci_high": value + half}


def round_numbers(number: int, reference: str = "previous", previous: str | None = None) -> dict[str, float]:
    """Return metrics of a round as its evaluation writes them.

    Args:
        number: Number of the round.
        reference: Reference of the iteration.
        previous: Name of the measured run directory of the round before, ``None`` for ``round-...``.
    """
    data = with_interval("eval/win_rate/chosen", 0.31 + 0.09 * number - 0.008 * number**2, 0.05)
    shared = {
        **with_interval("eval/kl", 0.0 if number == 0 else 4.1 - 0.7 * number, 0.3 if number else 0.0),
        **with_interval("eval/entropy", 1.62 - 0.21 * number, 0.04),
        **with_interval("eval/length", 41.0 + 6.5 * number, 1.6),
        **with_interval("eval/reward", 0.42 + 0.31 * number - 0.03 * number**2, 0.09),
        "eval/distinct_2": 0.61 - 0.08 * number,
        "eval/self_bleu": 0.24 + 0.05 * number,
    }
    if number == 0:
        return {"eval/win_rate": 0.5, **shared, **data}
    against_previous = (0.71 - 0.05 * number, 0.04)
    against_first = (0.71 - 0.05 + 0.06 * (number - 1), 0.04)
    main, other = (against_previous, against_first)
    name = "round-0"
    if reference == "first":
        main, other, name = against_first, against_previous, previous or f"round-{number - 1}"
    further = {} if number == 1 else with_interval(f"eval/win_rate/{name}", *other)
    if number > 1 and reference == "previous":
        further |= with_interval("eval/kl/first", 3.4 + 2.6 * (number - 1), 0.5)
    return {**with_interval("eval/win_rate", *main), **shared, **data, **further}


def make_iteration(
    directory: Path,
    rounds: int = 3,
    *,
    reference: Any = "previous",
    extrapolated: bool = False,
    last: RoundStatus = "finished",
) -> Iteration:
    """Write the directory of an iteration with its rounds' configurations and metrics.

    Args:
        directory: Directory of the iteration.
        rounds: Number of the last round that has begun.
        reference: Reference of the iteration.
        extrapolated: Whether extrapolated policies are measured, as in the iteration ``accelerated``.
        last: State of the last round; one that has not finished does not have metrics.
    """
    listed = []
    for number in range(rounds + 1):
        name = f"round-{number}"
        measured = f"{name}/extrapolated" if extrapolated and number else name
        status: RoundStatus = last if number == rounds else "finished"
        (directory / measured).mkdir(parents=True)
        (directory / name / "config.yaml").write_text(_config(number))
        if status == "finished":
            previous = "extrapolated" if extrapolated and number > 1 else None
            numbers = round_numbers(number, reference, previous)
            (directory / measured / "metrics.json").write_text(json.dumps(numbers))
            (directory / measured / "report.html").write_text("<!doctype html>")
        listed.append(Round(number, name, measured, status, 12.5 + 31 * number))
    iteration = Iteration("dpo", reference, 3, listed, _settings(reference))
    write_iteration(directory, iteration)
    return iteration


def _settings(reference: str) -> dict[str, Any]:
    """Return the group ``iteration`` as the command has it."""
    return {
        "rounds": 3,
        "reference": reference,
        "rewards": None,
        "momentum": 0.0,
        "limits": {"max_length_ratio": 1.5, "min_length_ratio": 0.67, "min_diversity_ratio": 0.7},
        "source": {
            "_target_": "spo.rounds.RoundSource",
            "source": {"_target_": "spo.data.stories.StorySource", "num_prompts": 5},
            "pairing": {"_target_": "spo.rounds.RejectionSampling", "beta": 0.5},
            "completions": 4,
            "top_p": 0.9,
            "policies": ["/somewhere/round-0/policy"],
            "round": 1,
        },
        "round": None,
    }


def _config(number: int) -> str:
    return f"""
method: {{name: {"dpo" if number else "sft"}}}
beta: {{_target_: spo.schedules.Constant, value: 0.1}}
data: {{path: /somewhere/pairs.jsonl}}
judge: {{_target_: spo.evaluation.judges.GoldJudge}}
choices: {{data: jsonl, model: tiny, judge: gold}}
seed: 0
trainer: {{max_steps: 200}}
"""
