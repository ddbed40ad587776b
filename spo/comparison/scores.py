"""Tables of scores, one row per seed and one column per prompt, from the samples that runs recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from spo.comparison.runs import Run, on_test_split
from spo.evaluation.winrate import at_equal_length, verdict_of_rewards
from spo.stats import Array
from spo.wording import finite

Row = Mapping[str, Any]


def unit_of(run: Run, row: Row) -> str:
    """The prompt of a row, whose samples stand together; the sample itself where there are no other prompts at all."""
    prompt = str(row.get("prompt_id"))
    return f"{prompt} {row.get('sample_index')}" if run.has_all_prompts else prompt


def _tokens(row: Row) -> float | None:
    tokens = row.get("tokens")
    return float(len(tokens)) if isinstance(tokens, list) else finite(tokens)


def _log_ratio(row: Row) -> float | None:
    policy, reference = finite(row.get("logp_policy")), finite(row.get("logp_reference"))
    return None if policy is None or reference is None else policy - reference


def _surprise(row: Row) -> float | None:
    policy = finite(row.get("logp_policy"))
    return None if policy is None else -policy


# What a single completion says about a metric: its mean over completions estimates the metric.
OF_A_ROW: dict[str, Callable[[Row], float | None]] = {
    "win_rate": lambda row: finite(row.get("verdict")),
    "reward": lambda row: finite(row.get("reward")),
    "length": _tokens,
    "kl": _log_ratio,
    "entropy_sequence": _surprise,
}


def of_prompts(run: Run, metric: str) -> dict[str, float]:
    """Array of a run by prompt, whose mean is the number that the run recorded.

    The KL and the entropy that a run records come from whole distributions; what its samples say about them, by their
    log-probabilities, serves for how they vary over prompts, and is moved to the recorded mean.

    Args:
        run: The run.
        metric: Without ``eval/``.

    Returns:
        Empty where samples do not say anything about the metric, as for distinct-n, or none were recorded.
    """
    if metric not in run.scores:
        run.scores[metric] = _of_prompts(run, metric)
    return run.scores[metric]


def _of_prompts(run: Run, metric: str) -> dict[str, float]:
    if metric == "entropy":
        values = _entropy(run)
    elif metric.endswith("_length_controlled"):
        values = _at_equal_length(run, _comparison(metric.removesuffix("_length_controlled")))
    else:
        values = _by_prompt(run, _row_value(metric))
    recorded = run.record.metric(f"eval/{metric}")
    if not values or recorded is None:
        return {}
    shift = recorded - fmean(values.values())
    return {prompt: value + shift for prompt, value in values.items()}


def _row_value(metric: str) -> Callable[[Row], float | None]:
    if metric.startswith("win_rate/"):
        of_opponent = _comparison(metric)
        return lambda row: finite(of_opponent(row).get("verdict"))
    return OF_A_ROW.get(metric, lambda row: None)


def _comparison(metric: str) -> Callable[[Row], Row]:
    """Where a row holds ``verdict`` and ``tokens`` of the other side: its reference's, or those of a named opponent."""
    name = metric.partition("/")[2]
    if not name:
        return lambda row: {"verdict": row.get("verdict"), "tokens": row.get("reference_tokens")}
    return lambda row: (row.get("opponents") or {}).get(name) or {}


def _by_prompt(run: Run, value: Callable[[Row], float | None]) -> dict[str, float]:
    """Mean over the samples of each prompt; those without a value, as an unanswered verdict, are left out."""
    found: dict[str, list[float]] = {}
    for row in run.samples:
        one = value(row)
        if one is not None:
            found.setdefault(unit_of(run, row), []).append(one)
    return {prompt: fmean(values) for prompt, values in found.items()}


def _entropy(run: Run) -> dict[str, float]:
    """A ratio of sums, nats over tokens, written as the mean that varies as it does (the delta method)."""
    nats, tokens = _by_prompt(run, _surprise), _by_prompt(run, _tokens)
    both = [prompt for prompt in nats if prompt in tokens]
    if not both or not (length := fmean(tokens[prompt] for prompt in both)):
        return {}
    rate = fmean(nats[prompt] for prompt in both) / length
    return {prompt: (nats[prompt] - rate * tokens[prompt]) / length for prompt in both}


def _at_equal_length(run: Run, of: Callable[[Row], Row]) -> dict[str, float]:
    """What each prompt contributes to the win rate at equal length: the jackknife's pseudo-values."""
    rows = []
    for row in run.samples:
        verdict, ours, theirs = finite(of(row).get("verdict")), _tokens(row), _tokens(of(row))
        if verdict is not None and ours is not None and theirs is not None:
            rows.append((unit_of(run, row), verdict, ours - theirs))
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in rows))
    if len(prompts) < 2:
        return {}
    place = {prompt: index for index, prompt in enumerate(prompts)}
    of_row = np.array([place[prompt] for prompt, _, _ in rows])
    alike = 1 / np.bincount(of_row)[of_row]  # prompts weigh alike
    weights = np.vstack([alike, *(alike * (of_row != index) for index in range(len(prompts)))])
    verdicts, differences = (np.array(values, dtype=np.float64) for values in list(zip(*rows, strict=True))[1:])
    whole, *without = at_equal_length(verdicts, differences, weights)
    values = len(prompts) * whole - (len(prompts) - 1) * np.array(without)
    return dict(zip(prompts, values.tolist(), strict=True))


def prompts_of(runs: Sequence[Run], metric: str) -> list[str]:
    """The prompts for which all of the runs have a score."""
    known = [of_prompts(run, metric) for run in runs]
    return [prompt for prompt in known[0] if all(prompt in one for one in known)] if known else []


def table(runs: Sequence[Run], metric: str, prompts: Sequence[str]) -> Array | None:
    """Array of several seeds on the same prompts.

    Args:
        runs: One per seed.
        metric: Without ``eval/``.
        prompts: Those that all have; without any, each seed has its recorded number alone.

    Returns:
        ``(S, P)``, or ``(S, 1)`` without prompts; ``None`` where a run has not recorded the metric.
    """
    recorded = [run.record.metric(f"eval/{metric}") for run in runs]
    if any(number is None for number in recorded):
        return None
    if not prompts:
        return np.array(recorded, dtype=np.float64)[:, None]
    rows = [of_prompts(run, metric) for run in runs]
    return np.array([[row[prompt] for prompt in prompts] for row in rows], dtype=np.float64)


def against(run: Run, other: Run) -> dict[str, float]:
    """How often a run beats another on each prompt: by their rewards, or as a judge has said of them.

    Every sample of the one meets every sample of the other. A judge that only compares has said so where one of the
    two was evaluated against the other, as it was the first time: ``spo evaluate RUN evaluation.against=[OTHER]``.

    Returns:
        Shares of the first by prompt; empty where nothing is known.
    """
    ours, theirs = _rewards(run), _rewards(other)
    if ours and theirs:
        return {
            prompt: fmean(verdict_of_rewards(one, two) for one in ours[prompt] for two in theirs[prompt])
            for prompt in ours
            if prompt in theirs
        }
    said = _judged(run, other)
    return said or {prompt: 1 - share for prompt, share in _judged(other, run).items()}


def _rewards(run: Run) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in run.samples:
        reward = finite(row.get("reward"))
        if reward is not None:
            found.setdefault(unit_of(run, row), []).append(reward)
    return found


def _judged(run: Run, other: Run) -> dict[str, float]:
    """What the judge of the run said in those evaluations that name the directory of the other as an opponent."""
    found: dict[str, list[float]] = {}
    directory = other.path.resolve()
    for evaluation in run.evaluations:
        # Directories in different sweeps share their names, which are all that the rows have.
        if directory not in [
            Path(str(name)).expanduser().resolve() for name in evaluation.get("evaluation.against") or ()
        ]:
            continue
        for row in on_test_split(evaluation):
            verdict = finite(((row.get("opponents") or {}).get(directory.name) or {}).get("verdict"))
            if verdict is not None:
                found.setdefault(unit_of(run, row), []).append(verdict)
    return {prompt: fmean(verdicts) for prompt, verdicts in found.items()}
