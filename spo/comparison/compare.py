"""The comparison itself: each method's numbers on the test split, and the differences that are significant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import fmean

import numpy as np

from spo.comparison.choice import (
    Setting,
    best_setting,
    better,
    choose_metric,
    choose_selector,
    describes_policy,
    settings_of,
)
from spo.comparison.refusals import Problem, find_problems
from spo.comparison.runs import CannotCompare, Found, Run
from spo.comparison.scores import score_table, shared_prompts, win_shares
from spo.metrics.catalogue import find, shown_in
from spo.stats import Bootstrap, Estimate, holm

# Level of the tests after correction.
LEVEL = 0.05


@dataclass(frozen=True)
class Method:
    """A method with everything that was tried for it.

    Attributes:
        name: Name of the method, ``method.name``.
        title: Name of the method for people.
        settings: Settings that were tried.
        best: Setting that is compared with other methods.
        estimates: Numbers of the best setting on the test split by metric, without ``eval/``.
        problems: Reasons why its numbers are not fair, in a comparison that was made anyway.
    """

    name: str
    title: str
    settings: Sequence[Setting]
    best: Setting
    estimates: Mapping[str, Estimate]
    problems: Sequence[Problem]


@dataclass(frozen=True)
class Difference:
    """Two methods compared by the main metric.

    Attributes:
        first: Name of a method.
        second: Name of another method.
        estimate: First method minus second; its interval and p-value are those of this difference alone.
        p: P-value corrected for the number of differences that are tested.
        paired: Whether equal seeds of both methods were compared with each other.
    """

    first: str
    second: str
    estimate: Estimate
    p: float | None
    paired: bool

    @property
    def significant(self) -> bool:
        """Return whether the corrected p-value is at most the level."""
        return self.p is not None and self.p <= LEVEL


@dataclass(frozen=True)
class Duel:
    """Share of prompts on which one method's completions beat another's.

    Attributes:
        first: Name of a method.
        second: Name of another method.
        estimate: Share of the first method; ``None`` where the two were not judged against each other.
    """

    first: str
    second: str
    estimate: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """Everything that the outputs of a comparison show.

    Attributes:
        methods: Methods by the main metric, the best first.
        differences: Differences of every two methods, or of each method to the baseline.
        duels: Duels of every two methods, in both directions.
        metric: Key of the main metric, with ``eval/``.
        higher: Whether more of the main metric is better; ``None`` where neither direction is.
        select: Metric by which the best settings were selected; ``None`` where there was nothing to select.
        baseline: Method that others are compared with; ``None`` where each is compared with each.
        reference: Numbers of the model that training started from, by metric.
        prompts: Number of test prompts.
        seeds: Seeds of the runs.
        problems: Reasons why the comparison is not fair, where it was made anyway.
        notes: Further sentences for the reader.
        bootstrap: Settings of the intervals and tests.
    """

    methods: Sequence[Method]
    differences: Sequence[Difference]
    duels: Sequence[Duel]
    metric: str
    higher: bool | None
    select: str | None
    baseline: str | None
    reference: Mapping[str, float]
    prompts: int
    seeds: Sequence[int]
    problems: Sequence[Problem]
    notes: Sequence[str] = field(default_factory=list)
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    @property
    def metric_name(self) -> str:
        """Return the main metric without ``eval/``."""
        return self.metric.removeprefix("eval/")


def compare(
    found: Found,
    *,
    metric: str | None = None,
    select: str | None = None,
    baseline: str | None = None,
    anyway: bool = False,
    bootstrap: Bootstrap | None = None,
) -> Comparison:
    """Compare the methods of some runs.

    Args:
        found: Runs to compare.
        metric: Key of ``metrics.json`` by which methods are ranked and tested; ``None`` for the win rate, or the
            reward where there is none.
        select: Key on the selection split by which a method's best setting is found; ``None`` for the first of
            ``SELECTORS`` that all runs have.
        baseline: Method with which each other one is compared; ``None`` for all pairs.
        anyway: Whether to continue with an unfair comparison, in which every output is marked.
        bootstrap: Settings of the intervals and tests; ``None`` for the default.

    Raises:
        CannotCompare: If the comparison would be unfair or there is nothing to compare. All problems are named.
    """
    bootstrap = bootstrap or Bootstrap()
    problems = find_problems(found)
    if problems and not anyway:
        raise CannotCompare([one.text for one in problems], "Fix them, or add --anyway to continue and mark them.")
    runs = [run for run in found.runs if run.failure is None]
    if not runs:
        raise CannotCompare([*(one.text for one in problems), "no run is finished"])
    names = list(dict.fromkeys(run.method for run in runs))
    if baseline is not None and baseline not in names:
        raise CannotCompare([f"--baseline {baseline}: there is no run of it; the methods are {', '.join(names)}"])
    unfinished = _without_finished_run(found.runs, names)
    notes = [*found.notes, *(f"{name} does not have a finished run" for name in unfinished)]
    metric = choose_metric(runs, metric, notes)
    of_method = {name: [run for run in runs if run.method == name] for name in names}
    selects = any(len({run.key for run in some}) > 1 for some in of_method.values())
    if select is not None and not selects:
        notes.append(f"Nothing was selected by {select}: every method has one setting.")
    select = choose_selector(runs, select, notes) if selects else None
    methods = [_method(name, some, select, problems, bootstrap) for name, some in of_method.items()]
    main, higher = metric.removeprefix("eval/"), better(metric)
    methods.sort(key=lambda method: (-1 if higher is not False else 1) * method.estimates[main].value)
    seeds = sorted({run.seed for run in runs})
    if len(seeds) == 1:
        notes.append("There is one seed: intervals cover the choice of prompts but not the choice of seeds.")
    return Comparison(
        methods=methods,
        differences=_differences(methods, main, baseline, bootstrap),
        duels=[_duel(one, two, bootstrap) for one in methods for two in methods if one is not two],
        metric=metric,
        higher=higher,
        select=select,
        baseline=baseline,
        reference=_reference(methods),
        prompts=len({row.get("prompt_id") for method in methods for run in method.best.runs for row in run.samples}),
        seeds=seeds,
        problems=problems,
        notes=notes,
        bootstrap=bootstrap,
    )


def _without_finished_run(runs: Iterable[Run], finished: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(run.method for run in runs) if name not in finished]


def _method(
    name: str, runs: Sequence[Run], select: str | None, problems: Sequence[Problem], bootstrap: Bootstrap
) -> Method:
    settings = settings_of(runs, select)
    best = best_setting(settings, select)
    return Method(
        name=name,
        title=str(runs[0].setting.get("method.title", name)),
        settings=settings,
        best=best,
        estimates=_estimates(best, bootstrap),
        problems=[problem for problem in problems if not problem.methods or name in problem.methods],
    )


def _estimates(setting: Setting, bootstrap: Bootstrap) -> dict[str, Estimate]:
    shared = set.intersection(*(set(run.record.metrics or {}) for run in setting.runs))
    found = {}
    for name in [key.removeprefix("eval/") for key in sorted(shared) if key.startswith("eval/")]:
        scores = score_table(setting.runs, name, shared_prompts(setting.runs, name)) if describes_policy(name) else None
        if scores is not None:
            found[name] = _bounded(bootstrap.mean(scores), name)
    return found


def _differences(
    methods: Sequence[Method], metric: str, baseline: str | None, bootstrap: Bootstrap
) -> list[Difference]:
    pairs = [
        (one, two) if two.name == baseline or baseline is None else (two, one)
        for one, two in combinations(methods, 2)
        if baseline in (None, one.name, two.name)
    ]
    found = []
    for one, two in pairs:
        prompts = shared_prompts([*one.best.runs, *two.best.runs], metric)
        first, second = (score_table(method.best.runs, metric, prompts) for method in (one, two))
        assert first is not None and second is not None, "the metric is one that all runs have"
        paired = one.best.seeds == two.best.seeds
        found.append((one.name, two.name, bootstrap.difference(first, second, paired=paired), paired))
    # A difference without a test does not count in the correction.
    tested = [estimate.p for _, _, estimate, _ in found if estimate.p is not None]
    corrected = iter(holm(tested))
    return [
        Difference(first, second, estimate, None if estimate.p is None else next(corrected), paired)
        for first, second, estimate, paired in found
    ]


def _duel(one: Method, two: Method, bootstrap: Bootstrap) -> Duel:
    paired = one.best.seeds == two.best.seeds
    rows = [
        _mean([win_shares(run, other) for other in ([two.best.runs[place]] if paired else two.best.runs)])
        for place, run in enumerate(one.best.runs)
    ]
    prompts = [prompt for prompt in rows[0] if all(prompt in row for row in rows)]
    if not prompts:
        return Duel(one.name, two.name, None)
    lead = bootstrap.mean(np.array([[row[prompt] for prompt in prompts] for row in rows]) - 0.5)
    share = replace(lead, value=lead.value + 0.5, **{end: _moved(getattr(lead, end), 0.5) for end in ("low", "high")})
    return Duel(one.name, two.name, _bounded(share, "win_rate"))


def _moved(end: float | None, by: float) -> float | None:
    return None if end is None else end + by


def _bounded(estimate: Estimate, metric: str) -> Estimate:
    """Cut an interval to the range of the metric: few seeds make wide intervals."""
    entry = find(metric)
    if estimate.low is None or estimate.high is None or entry is None or entry.bounds is None:
        return estimate
    lowest, highest = entry.bounds
    return replace(estimate, low=max(estimate.low, lowest), high=min(estimate.high, highest))


def _mean(shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    common = [prompt for prompt in shares[0] if all(prompt in one for one in shares)]
    return {prompt: fmean(one[prompt] for one in shares) for prompt in common}


def _reference(methods: Sequence[Method]) -> dict[str, float]:
    runs = [run for method in methods for run in method.best.runs]
    shown = shown_in("comparison")
    found = {name: entry.neutral for name in shown if (entry := find(name)) and entry.neutral is not None}
    for name in shown:
        numbers = [run.record.metric(f"eval/reference/{name}") for run in runs]
        known = [one for one in numbers if one is not None]
        if known:
            found[name] = fmean(known)
    return found
