"""Reasons that make a comparison unfair. All of them are reported, not just the first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from spo.comparison.groups import METHOD, Groups, group_runs
from spo.comparison.runs import Found, Run
from spo.metrics.trained import written
from spo.records.operational_keys import is_in
from spo.wording import quoted

# Parts of a configuration that must be the same for all runs: the data, the initial model and the evaluation.
_DATA, _START, _JUDGING = ("data",), ("model", "sft"), ("evaluation", "judge")
# Keys of how long a run trains.
_LENGTH = ("trainer",)
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
        methods: Names of the methods or groups whose numbers it affects; empty for all of them.
    """

    text: str
    methods: frozenset[str] = frozenset()


def find_problems(found: Found, groups: Groups | None = None) -> list[Problem]:
    """Find every reason why comparing these runs is not fair.

    What the groups are made by may differ between them: ``--by data.num_pairs`` allows other numbers of pairs.

    Args:
        found: Runs to compare.
        groups: Groups of the runs; ``None`` for the default ones.
    """
    runs = found.runs
    groups = group_runs(runs) if groups is None else groups
    finished = [run for run in runs if run.failure is None]
    problems = [Problem(text) for text in found.problems]
    problems += [Problem(f"{run.name} is {run.failure}", frozenset({groups.names[run]})) for run in runs if run.failure]
    problems += [*_mixed_methods(runs, groups), *_duplicates(finished, groups), *_trials(runs, groups)]
    problems += [*_budgets(finished, groups), *_seeds(runs, groups), *_mixed_digests(finished, groups)]
    for what, parts in (("the data", _DATA), ("the initial model", _START), ("the evaluation", _JUDGING)):
        problems += _mixed(finished, what, parts, groups)
    return [*problems, *_prompts(finished)]


def _by(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def _names(items: Sequence[Any]) -> str:
    shown = ", ".join(map(str, items[:_MAX_NAMES]))
    return f"{shown} and {len(items) - _MAX_NAMES} more" if len(items) > _MAX_NAMES else shown


def _mixed_methods(runs: Sequence[Run], groups: Groups) -> list[Problem]:
    """Find groups that contain runs of several methods, of which one would be selected."""
    keys = ",".join([METHOD, *groups.by])
    return [
        Problem(f"{quoted(name)} mixes the methods {_names(methods)}: write --by {keys}", frozenset({name}))
        for name, some in _by(runs, groups.names.__getitem__).items()
        if len(methods := sorted({run.method for run in some})) > 1
    ]


def _duplicates(runs: Sequence[Run], groups: Groups) -> list[Problem]:
    """Find runs of the same setting and seed that differ in their code or in the files that they read."""
    return [
        Problem(
            f"{_names([run.name for run in some])} have the same setting and seed but are different runs "
            f"({_reason(some)}): leave one out",
            frozenset({groups.names[some[0]]}),
        )
        for some in _by(runs, lambda run: (groups.names[run], run.key, run.seed)).values()
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


def _trials(runs: Sequence[Run], groups: Groups) -> list[Problem]:
    """Find groups with more settings than others."""
    trials = {name: len({run.key for run in some}) for name, some in _by(runs, groups.names.__getitem__).items()}
    if len(set(trials.values())) <= 1:
        return []
    counted = ", ".join(f"{quoted(name)} {count}" for name, count in trials.items())
    text = f"the numbers of settings tried differ: {counted}; the best of many settings is better by chance alone"
    if groups.choices:
        text += f" (with --by {METHOD}, the choices of {_names(groups.choices)} are settings of a method)"
    most = max(trials.values())
    return [Problem(text, frozenset(name for name, count in trials.items() if count == most))]


def _budgets(runs: Sequence[Run], groups: Groups) -> list[Problem]:
    """Find groups that were trained for other numbers of steps or pairs than others, on the seeds that they share.

    Groups that are made by the number of steps have other numbers. Groups that are made by a key of the data take as
    many steps, but their batches may have other sizes.
    """
    counted = all(run.trained_pairs is not None for run in runs)

    def steps(run: Run) -> str:
        return f"{run.trained_steps or 0:,.0f} steps"

    def steps_and_pairs(run: Run) -> str:
        count = run.trained_pairs if counted else None
        pairs = f"of {run.setting.get('data.batch_size')}" if count is None else f"on {written(count)}"
        return f"{steps(run)} {pairs} pairs"

    for parts, words in (((*_LENGTH, *_DATA), steps_and_pairs), (_LENGTH, steps)):
        for some in _by(runs, lambda run: groups.bucket(run, parts)).values():  # noqa: B023
            if problem := _budget_problem(some, groups, words):
                return [problem]
    return []


def _budget_problem(runs: Sequence[Run], groups: Groups, words: Callable[[Run], str]) -> Problem | None:
    spent = {
        name: {seed: Counter(map(words, of_seed)) for seed, of_seed in _by(some, lambda run: run.seed).items()}
        for name, some in _by(runs, groups.names.__getitem__).items()
    }
    if all(_equal_budgets(one, other) for one, other in combinations(spent.values(), 2)):
        return None
    described = ", ".join(f"{quoted(name)} {_budget_by_seed(by_seed)}" for name, by_seed in spent.items())
    return Problem(f"the {groups.noun}s were trained for different lengths: {described}")


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


def _seeds(runs: Sequence[Run], groups: Groups) -> list[Problem]:
    """Find settings that lack a seed that other settings have."""
    wanted = {run.seed for run in runs}
    problems = []
    for name, some in _by(runs, groups.names.__getitem__).items():
        settings = _by(some, lambda run: run.key).values()
        lacking: dict[str, int] = {}
        for of_setting in settings:
            missing = sorted(wanted - {run.seed for run in of_setting})
            if missing:
                words = f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
                lacking[words] = lacking.get(words, 0) + 1
        for words, count in lacking.items():
            which = f"{count} of its {len(settings)} settings" if len(settings) > 1 else "it"
            problems.append(
                Problem(f"{quoted(name)}: {which} lack{'s' if which == 'it' else ''} {words}", frozenset({name}))
            )
    return problems


def _mixed_digests(runs: Sequence[Run], groups: Groups) -> list[Problem]:
    problems = []
    # With pairs that are drawn by the seed of the run, each seed has pairs of its own.
    drawn = any(_draws_pairs(run) for run in runs)
    for key, words, parts in (
        ("pairs_sha256", "the preference pairs", _DATA),
        ("reference_sha256", "the reference models", (*_DATA, *_START)),
    ):
        for of_bucket in _by(runs, lambda run: (groups.bucket(run, parts), drawn and run.seed)).values():  # noqa: B023
            digests = _by(of_bucket, lambda run: run.record.input_digest(key))  # noqa: B023
            if len(digests) > 1:
                counted = "; ".join(
                    f"{str(digest)[:8] if digest else 'not recorded'}: {_names([run.name for run in some])}"
                    for digest, some in digests.items()
                )
                of_seed = " of a seed" if drawn else ""
                problems.append(Problem(f"{words} are not the same for all runs{of_seed} ({counted})"))
                break
    return problems


def _draws_pairs(run: Run) -> bool:
    """Return whether the pairs follow from the seed; the seed of a subset has no effect without a subset."""
    of_seed = {key for key in run.config if key.partition(".")[0] in _DATA and is_in(key, run.of_seed)}
    return bool(of_seed - (set() if run.config.get("data.num_pairs") else {"data.subset_seed"}))


def _mixed(runs: Sequence[Run], what: str, parts: Sequence[str], groups: Groups) -> list[Problem]:
    """Find keys that differ in parts of the configuration that must be the same for all runs.

    A key that the groups are made by must be the same within each group.
    """
    keys = {key for run in runs for key in run.setting if key.partition(".")[0] in parts and key not in _BUDGET}
    # A default, such as a method's learning rate in `model.default_lr`, has its effect through the keys that read it.
    keys = {key for key in keys if not key.rpartition(".")[2].startswith("default_")}
    differing = []
    for key in sorted(keys):
        free = groups.is_free(key, runs)
        for some in _by(runs, lambda run: groups.names[run] if free else "").values():  # noqa: B023
            values = {json.dumps(run.setting.get(key), sort_keys=True, default=str) for run in some}
            if len(values) > 1:
                differing.append(f"{key} ({' or '.join(sorted(values))})")
                break
    return [Problem(f"{what} differs between runs: {_names(differing)}")] if differing else []


def _prompts(runs: Sequence[Run]) -> list[Problem]:
    groups = _by(runs, lambda run: frozenset((row.get("prompt_id"), row.get("sample_index")) for row in run.samples))
    if len(groups) <= 1:
        return []
    counted = "; ".join(f"{len(rows):,} samples: {_names([run.name for run in some])}" for rows, some in groups.items())
    return [Problem(f"the test prompts are not the same for all runs ({counted})")]
