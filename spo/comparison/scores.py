"""Tables of scores, one row per seed and one column per prompt, from the samples that runs recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from spo.comparison.runs import Run, on_test_split
from spo.evaluation.winrate import at_equal_length, verdict_of_rewards
from spo.metrics.catalogue import PerSample, Row, comparisons, find, with_opponent
from spo.records.iteration import with_own_rounds
from spo.records.run import RunRecord
from spo.stats import Array
from spo.wording import finite


def resampling_unit(run: Run, row: Row) -> str:
    """Return what is independent in a row: its prompt, or the sample where the prompts are all there are."""
    prompt = str(row.get("prompt_id"))
    return f"{prompt} {row.get('sample_index')}" if run.has_all_prompts else prompt


def scores_by_prompt(run: Run, metric: str) -> dict[str, float]:
    """Return the scores of a run by prompt, with the recorded number as their mean.

    The KL and the entropy that a run records come from whole distributions. The log-probs of its samples estimate how
    they vary over prompts; these estimates are shifted to the recorded mean.

    Args:
        run: Run to read.
        metric: Key without ``eval/``.

    Returns:
        Scores by prompt; empty where single samples do not have a value, as for distinct-n, or none were recorded.
    """
    if metric not in run.scores:
        run.scores[metric] = _scores_by_prompt(run, metric)
    return run.scores[metric]


def _scores_by_prompt(run: Run, metric: str) -> dict[str, float]:
    entry, recorded = find(metric), run.record.metric(f"eval/{metric}")
    if entry is None or entry.per_sample is None:
        return {}
    units = [resampling_unit(run, row) for row in run.samples]
    rows: Sequence[Row] = run.samples
    if entry.parameter == "OPPONENT":
        opponent = entry.argument(metric) or ""
        rows = [with_opponent(row, opponent) for row in rows]
    if entry.covariate is not None:
        compared = [(unit, one) for unit, row in zip(units, rows, strict=True) for one in comparisons(row)]
        units, rows = [unit for unit, _ in compared], [one for _, one in compared]
        values = _at_zero(units, rows, entry.per_sample, entry.covariate)
    elif entry.per is not None:
        values = _ratio(_by_prompt(units, rows, entry.per_sample), _by_prompt(units, rows, entry.per))
    else:
        values = _by_prompt(units, rows, entry.per_sample)
    if not values or recorded is None:
        return {}
    shift = recorded - fmean(values.values())
    return {prompt: value + shift for prompt, value in values.items()}


def _by_prompt(units: Sequence[str], rows: Sequence[Row], per_sample: PerSample) -> dict[str, float]:
    """Return the mean over the samples of each prompt, without rows that lack a value, such as unanswered verdicts."""
    found: dict[str, list[float]] = {}
    for unit, row in zip(units, rows, strict=True):
        value = per_sample(row)
        if value is not None:
            found.setdefault(unit, []).append(value)
    return {prompt: fmean(values) for prompt, values in found.items()}


def _ratio(above: Mapping[str, float], below: Mapping[str, float]) -> dict[str, float]:
    """Write a ratio of sums as the mean that varies over prompts as the ratio does (the delta method)."""
    both = [prompt for prompt in above if prompt in below]
    if not both or not (size := fmean(below[prompt] for prompt in both)):
        return {}
    rate = fmean(above[prompt] for prompt in both) / size
    return {prompt: (above[prompt] - rate * below[prompt]) / size for prompt in both}


def _at_zero(
    units: Sequence[str], rows: Sequence[Row], per_sample: PerSample, covariate: PerSample
) -> dict[str, float]:
    """Return the jackknife pseudo-value of each prompt for the win rate where a covariate is zero."""
    known = []
    for unit, row in zip(units, rows, strict=True):
        value, difference = per_sample(row), covariate(row)
        if value is not None and difference is not None:
            known.append((unit, value, difference))
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in known))
    if len(prompts) < 2:
        return {}
    place = {prompt: index for index, prompt in enumerate(prompts)}
    of_row = np.array([place[prompt] for prompt, _, _ in known])
    even = 1 / np.bincount(of_row)[of_row]  # all prompts have the same weight
    weights = np.vstack([even, *(even * (of_row != index) for index in range(len(prompts)))])
    verdicts, differences = (np.array(values, dtype=np.float64) for values in list(zip(*known, strict=True))[1:])
    whole, *without = at_equal_length(verdicts, differences, weights)
    values = len(prompts) * whole - (len(prompts) - 1) * np.array(without)
    return dict(zip(prompts, values.tolist(), strict=True))


def shared_prompts(runs: Sequence[Run], metric: str) -> list[str]:
    """Return the prompts for which all runs have a score."""
    known = [scores_by_prompt(run, metric) for run in runs]
    return [prompt for prompt in known[0] if all(prompt in one for one in known)] if known else []


def score_table(runs: Sequence[Run], metric: str, prompts: Sequence[str]) -> Array | None:
    """Return the scores of several seeds on the same prompts.

    Args:
        runs: Runs of one setting, one per seed.
        metric: Key without ``eval/``.
        prompts: Prompts that all runs have; if empty, the recorded numbers are the scores.

    Returns:
        ``(S, P)``, or ``(S, 1)`` without prompts; ``None`` where a run did not record the metric.
    """
    recorded = [run.record.metric(f"eval/{metric}") for run in runs]
    if any(number is None for number in recorded):
        return None
    if not prompts:
        return np.array(recorded, dtype=np.float64)[:, None]
    rows = [scores_by_prompt(run, metric) for run in runs]
    return np.array([[row[prompt] for prompt in prompts] for row in rows], dtype=np.float64)


def win_shares(run: Run, other: Run) -> dict[str, float]:
    """Return how often a run beats another on each prompt, by their rewards or by the verdicts of a judge.

    With rewards, every sample of one run is compared with every independent sample of the other, see
    :func:`share_random_numbers`. Verdicts exist where one of the two was evaluated against the other with the same
    settings: ``spo evaluate RUN evaluation.against=[OTHER]``.

    Args:
        run: Run whose wins count.
        other: Run to compare with.

    Returns:
        Share of wins by prompt; empty where the two were not compared.
    """
    if run.rewards and other.rewards:
        return _shares_of_rewards(run, other)
    found, is_reversed, _ = _shares_of_verdicts(run, other)
    return {prompt: 1 - share for prompt, share in found.items()} if is_reversed else found


def share_random_numbers(run: Run, other: Run) -> bool:
    """Return whether two runs have one sample per prompt and draw it with the same random numbers.

    Runs with the same evaluation seed draw sample i of a prompt with the same random numbers. If their policies are
    alike, so are these samples, and the share of wins is further from one half than that of independent samples.
    With several samples of a prompt, :func:`win_shares` compares those of different numbers.

    Args:
        run: Run that recorded its samples.
        other: Another such run.
    """
    if not (run.has_single_samples and other.has_single_samples):
        return False
    if run.rewards and other.rewards:
        return _have_equal_seeds(run.record, other.record)
    return _shares_of_verdicts(run, other)[2]


def _have_equal_seeds(evaluation: RunRecord, other: RunRecord) -> bool:
    return bool(evaluation.get("evaluation.seed") == other.get("evaluation.seed"))


def _shares_of_rewards(run: Run, other: Run) -> dict[str, float]:
    """Return how often the rewards of one run are higher, by prompt or whatever else is independent."""
    equal_seeds, shares = _have_equal_seeds(run.record, other.record), dict[str, list[float]]()
    for row in run.samples:
        prompt, number = str(row.get("prompt_id")), int(row.get("sample_index") or 0)
        reward, theirs = run.rewards.get(prompt, {}).get(number), other.rewards.get(prompt, {})
        others = [one for one in theirs if one != number or not equal_seeds or len(theirs) == 1]
        if reward is None or not others:
            continue
        if run.has_all_prompts:  # A sample of the other run that several samples meet would make them dependent.
            others = [min((one for one in others if one > number), default=others[0])]
        wins = [verdict_of_rewards(reward, theirs[one]) for one in others]
        shares.setdefault(resampling_unit(run, row), []).append(fmean(wins))
    return {unit: fmean(wins) for unit, wins in shares.items()}


def _shares_of_verdicts(run: Run, other: Run) -> tuple[dict[str, float], bool, bool]:
    """Return the verdicts between two runs, those of independent samples if there are any.

    Returns:
        Shares by prompt or whatever else is independent, empty without verdicts; whether they are the shares of the
        other run; and whether the samples had the same random numbers.
    """
    ours, theirs = _judged(run, other), _judged(other, run)
    for equal_seeds in (False, True):
        for found, is_reversed in ((ours, False), (theirs, True)):
            if found[equal_seeds]:
                return found[equal_seeds], is_reversed, equal_seeds
    return {}, False, False


def _judged(run: Run, other: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Return the verdicts of the evaluations that name the directory of the other run as an opponent.

    Returns:
        Verdicts of the evaluations with another seed than that of the other run, and those with the same one.
    """
    by_seed: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    directory = other.path.resolve()
    for evaluation in run.evaluations:
        # Rows hold the name of a directory only, which directories of different sweeps share.
        config = with_own_rounds(evaluation.config, run.path)
        against = replace(evaluation, config=config).get("evaluation.against") or ()
        if directory not in [Path(str(name)).expanduser().resolve() for name in against]:
            continue
        found = by_seed[_have_equal_seeds(evaluation, other.record)]
        for row in on_test_split(evaluation):
            verdict = finite(((row.get("opponents") or {}).get(directory.name) or {}).get("verdict"))
            if verdict is not None:
                found.setdefault(resampling_unit(run, row), []).append(verdict)
    independent, alike = ({unit: fmean(verdicts) for unit, verdicts in found.items()} for found in by_seed)
    return independent, alike
