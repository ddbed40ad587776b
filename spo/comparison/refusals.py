"""Reasons that make a comparison unfair. All of them are reported, not just the first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from spo.comparison.runs import Found, Run
from spo.metrics.trained import written

# Parts of a configuration that must be the same for all runs: the data, the initial model and the evaluation.
_DATA, _START, _JUDGING = ("data",), ("model", "sft"), ("evaluation", "judge")
# The budget is compared by itself: by what was trained, where the runs recorded it.
_BUDGET = ("trainer.max_steps", "data.batch_size")
# Names in a message beyond which the rest is counted.
_MAX_NAMES = 6
_BySeed = Mapping[int, Counter[str]]


@dataclass(frozen=True)
class Problem:
    """A reason why a comparison is not fair.

    Attributes:
        text: Reason as a sentence.
        methods: Methods whose numbers it affects; empty for all methods.
    """

    text: str
    methods: frozenset[str] = frozenset()


def find_problems(found: Found) -> list[Problem]:
    """Find every reason why comparing the methods of these runs is not fair."""
    runs = found.runs
    finished = [run for run in runs if run.failure is None]
    problems = [Problem(text) for text in found.problems]
    problems += [Problem(f"{run.name} is {run.failure}", frozenset({run.method})) for run in runs if run.failure]
    problems += [*_duplicates(finished), *_trials(runs), *_budgets(finished), *_seeds(runs)]
    problems += _mixed_digests(finished)
    problems += [*_mixed(finished, "the data", _DATA), *_mixed(finished, "the initial model", _START)]
    problems += [*_mixed(finished, "the evaluation", _JUDGING), *_prompts(finished)]
    return problems


def _by(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def _names(items: Sequence[Any]) -> str:
    shown = ", ".join(map(str, items[:_MAX_NAMES]))
    return f"{shown} and {len(items) - _MAX_NAMES} more" if len(items) > _MAX_NAMES else shown


def _duplicates(runs: Sequence[Run]) -> list[Problem]:
    """Find runs of the same setting and seed that differ in their code or in the files that they read."""
    return [
        Problem(
            f"{_names([run.name for run in some])} have the same setting and seed but are different runs "
            f"({_reason(some)}): leave one out",
            frozenset({some[0].method}),
        )
        for some in _by(runs, lambda run: (run.method, run.key, run.seed)).values()
        if len(some) > 1
    ]


def _reason(runs: Sequence[Run]) -> str:
    parts = {
        "code": "the code of spo",
        "plugins": "the code of plugins",
        "data": "the data files",
        "weights": "the model",
        "adapter": "the adapter",
        "regularizer_prompts": "the prompts of the regularizer",
    }
    differing = [text for key, text in parts.items() if len({str(run.identity.get(key)) for run in runs}) > 1]
    verb = "differs" if len(differing) == 1 else "differ"
    return f"{' and '.join(differing)} {verb}" if differing else "their configurations differ"


def _trials(runs: Sequence[Run]) -> list[Problem]:
    """Find methods with more settings than others."""
    trials = {name: len({run.key for run in some}) for name, some in _by(runs, lambda run: run.method).items()}
    if len(set(trials.values())) <= 1:
        return []
    counted, most = ", ".join(f"{name} {count}" for name, count in trials.items()), max(trials.values())
    text = f"the numbers of settings tried differ: {counted}; the best of many settings is better by chance alone"
    return [Problem(text, frozenset(name for name, count in trials.items() if count == most))]


def _budgets(runs: Sequence[Run]) -> list[Problem]:
    """Find methods that were trained for other numbers of steps or pairs than others, on the seeds that they share."""
    counted = all(run.trained_pairs is not None for run in runs)

    def words(run: Run) -> str:
        count = run.trained_pairs if counted else None
        pairs = f"of {run.setting.get('data.batch_size')}" if count is None else f"on {written(count)}"
        return f"{run.trained_steps or 0:,.0f} steps {pairs} pairs"

    methods = _by(runs, lambda run: run.method)
    spent = {
        name: {seed: Counter(map(words, of_seed)) for seed, of_seed in _by(some, lambda run: run.seed).items()}
        for name, some in methods.items()
    }
    if all(_equal_budgets(one, other) for one, other in combinations(spent.values(), 2)):
        return []
    described = ", ".join(f"{name} {_budget_by_seed(by_seed)}" for name, by_seed in spent.items())
    return [Problem(f"the methods were trained for different lengths: {described}")]


def _equal_budgets(one: _BySeed, other: _BySeed) -> bool:
    shared = one.keys() & other.keys()
    if not shared:
        return _equal(sum(one.values(), Counter()), sum(other.values(), Counter()))
    return all(_equal(one[seed], other[seed]) for seed in shared)


def _equal(one: Counter[str], other: Counter[str]) -> bool:
    """Return whether budgets are the same; unequal numbers of settings are a problem of their own."""
    return one == other if one.total() == other.total() else one.keys() == other.keys()


def _budget_by_seed(by_seed: _BySeed) -> str:
    """Write the budgets of a method, with their seeds where they differ."""
    seeds: dict[str, list[int]] = {}
    for seed, budgets in sorted(by_seed.items()):
        for budget in budgets:
            seeds.setdefault(budget, []).append(seed)
    if len(seeds) == 1:
        return next(iter(seeds))
    return _names([f"{budget} (seed{'s' if len(some) > 1 else ''} {_names(some)})" for budget, some in seeds.items()])


def _seeds(runs: Sequence[Run]) -> list[Problem]:
    """Find settings that lack a seed that other settings have."""
    wanted = {run.seed for run in runs}
    problems = []
    for name, some in _by(runs, lambda run: run.method).items():
        settings = _by(some, lambda run: run.key).values()
        lacking: dict[str, int] = {}
        for of_setting in settings:
            missing = sorted(wanted - {run.seed for run in of_setting})
            if missing:
                words = f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
                lacking[words] = lacking.get(words, 0) + 1
        for words, count in lacking.items():
            which = f"{count} of its {len(settings)} settings" if len(settings) > 1 else "it"
            problems.append(Problem(f"{name}: {which} lack{'s' if which == 'it' else ''} {words}", frozenset({name})))
    return problems


def _mixed_digests(runs: Sequence[Run]) -> list[Problem]:
    # With data.num_pairs, each seed draws training pairs of its own.
    subsets = any(run.setting.get("data.num_pairs") is not None for run in runs)
    seeds = list(_by(runs, lambda run: run.seed).values()) if subsets else [runs]
    whose = " of a seed" if subsets else ""
    problems = [one for some in seeds for one in _mixed_digest(some, "pairs_sha256", "the preference pairs", whose)]
    return [*problems, *_mixed_digest(runs, "reference_sha256", "the reference models")]


def _mixed_digest(runs: Sequence[Run], key: str, words: str, whose: str = "") -> list[Problem]:
    groups = _by(runs, lambda run: run.record.input_digest(key))
    if len(groups) <= 1:
        return []
    counted = "; ".join(
        f"{str(digest)[:8] if digest else 'not recorded'}: {_names([run.name for run in some])}"
        for digest, some in groups.items()
    )
    return [Problem(f"{words} are not the same for all runs{whose} ({counted})")]


def _mixed(runs: Sequence[Run], what: str, parts: Sequence[str]) -> list[Problem]:
    """Find keys that differ in parts of the configuration that must be the same for all runs."""
    keys = {key for run in runs for key in run.setting if key.partition(".")[0] in parts and key not in _BUDGET}
    values: Mapping[str, set[str]] = {
        key: {json.dumps(run.setting.get(key), sort_keys=True, default=str) for run in runs} for key in sorted(keys)
    }
    differing = [f"{key} ({' or '.join(sorted(some))})" for key, some in values.items() if len(some) > 1]
    return [Problem(f"{what} differs between runs: {_names(differing)}")] if differing else []


def _prompts(runs: Sequence[Run]) -> list[Problem]:
    groups = _by(runs, lambda run: frozenset((row.get("prompt_id"), row.get("sample_index")) for row in run.samples))
    if len(groups) <= 1:
        return []
    counted = "; ".join(f"{len(rows):,} samples: {_names([run.name for run in some])}" for rows, some in groups.items())
    return [Problem(f"the test prompts are not the same for all runs ({counted})")]
