"""The comparison itself: each method's numbers on the test split, and the differences that are significant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    edges,
    settings_of,
)
from spo.comparison.groups import Groups, group_runs
from spo.comparison.refusals import Problem, find_problems
from spo.comparison.runs import CannotCompare, Found, Run
from spo.comparison.scores import score_table, share_random_numbers, shared_prompts, win_shares
from spo.metrics.catalogue import SHARE, find, shown_in
from spo.stats import Array, Bootstrap, Estimate, holm
from spo.wording import quoted

# Level of the tests after correction.
LEVEL = 0.05


@dataclass(frozen=True)
class Method:
    """A group of runs, such as those of a method, with everything that was tried for it.

    Attributes:
        name: Unique name of the group: ``method.name``, or several values such as ``spo, local_kl``.
        title: Name of the group for people.
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
        estimate: Share of the first method, tested against one half; its interval and p-value are those of this duel
            alone. ``None`` where the two were not judged against each other.
        p: P-value corrected for the number of pairs that were judged against each other.
    """

    first: str
    second: str
    estimate: Estimate | None
    p: float | None = None

    @property
    def significant(self) -> bool:
        """Return whether the corrected p-value is at most the level."""
        return self.p is not None and self.p <= LEVEL

    def reversed(self) -> Duel:
        """Return the same duel from the side of the second method."""
        one = self.estimate
        if one is not None:
            low, high = (None if end is None else 1 - end for end in (one.high, one.low))
            one = replace(one, value=1 - one.value, low=low, high=high)
        return Duel(self.second, self.first, one, self.p)


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
        groups: Groups of the runs, and the keys that they were made by.
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
    groups: Groups = field(default_factory=lambda: group_runs([]), repr=False)

    @property
    def metric_name(self) -> str:
        """Return the main metric without ``eval/``."""
        return self.metric.removeprefix("eval/")


def compare(
    found: Found,
    *,
    by: str | Sequence[str] = (),
    metric: str | None = None,
    select: str | None = None,
    baseline: str | None = None,
    anyway: bool = False,
    bootstrap: Bootstrap | None = None,
) -> Comparison:
    """Compare the methods of some runs, or other groups of them.

    Args:
        found: Runs to compare.
        by: Keys whose values make a group, as in :func:`spo.comparison.groups.group_runs`; none for groups by method
            and by the choices that differ between runs of a method.
        metric: Key of ``metrics.json`` by which methods are ranked and tested; ``None`` for the win rate, or the
            reward where there is none.
        select: Key on the selection split by which a method's best setting is found; ``None`` for the first of
            ``SELECTORS`` that all runs have.
        baseline: Name of the method or group with which each other one is compared; ``None`` for all pairs.
        anyway: Whether to continue with an unfair comparison, in which every output is marked.
        bootstrap: Settings of the intervals and tests; ``None`` for the default.

    Raises:
        CannotCompare: If the comparison would be unfair or there is nothing to compare. All problems are named.
    """
    bootstrap = bootstrap or Bootstrap()
    groups = group_runs(found.runs, by)
    problems = find_problems(found, groups)
    if problems and not anyway:
        raise CannotCompare([one.text for one in problems], "Fix them, or add --anyway to continue and mark them.")
    runs = [run for run in found.runs if run.failure is None]
    if not runs:
        raise CannotCompare([*(one.text for one in problems), "no run is finished"])
    names = list(dict.fromkeys(groups.names[run] for run in runs))
    if baseline is not None and baseline not in names:
        known = f"the {groups.noun}s are {', '.join(map(quoted, names))}"
        raise CannotCompare([f"--baseline {baseline}: there is no run of it; {known}"])
    unfinished = [name for name in dict.fromkeys(groups.names[run] for run in found.runs) if name not in names]
    notes = [*found.notes, *(f"{quoted(name)} does not have a finished run" for name in unfinished)]
    metric = choose_metric(runs, metric, notes)
    of_group = {name: [run for run in runs if groups.names[run] == name] for name in names}
    selects = any(len({run.key for run in some}) > 1 for some in of_group.values())
    if select is not None and not selects:
        notes.append(f"Nothing was selected by {select}: every {groups.noun} has one setting.")
    select = choose_selector(runs, select, notes) if selects else None
    methods = [
        _method(name, groups.titles[some[0]], some, select, problems, bootstrap) for name, some in of_group.items()
    ]
    main, higher = metric.removeprefix("eval/"), better(metric)
    methods.sort(key=lambda method: (-1 if higher is not False else 1) * method.estimates[main].value)
    seeds = sorted({run.seed for run in runs})
    for method in methods if select is not None else ():
        notes += edges(quoted(method.name), method.settings, method.best)
    notes += [*_about_seeds(methods), *_about_duels(methods)]
    return Comparison(
        methods=methods,
        differences=_differences(methods, main, baseline, bootstrap),
        duels=_duels(methods, bootstrap),
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
        groups=groups,
    )


def _about_duels(methods: Sequence[Method]) -> list[str]:
    """Say where the head-to-head results compare samples that are alike by their random numbers."""
    alike = [
        all(share_random_numbers(run, other) for run in one.best.runs for other in two.best.runs)
        for one, two in combinations(methods, 2)
    ]
    if any(alike):
        return [
            "Head to head, the samples of one seed share their random numbers, which moves the shares away from one "
            "half. Several seeds, or evaluation.samples_per_prompt of 2 or more, compare independent samples."
        ]
    return []


def _about_seeds(methods: Sequence[Method]) -> list[str]:
    """Explain intervals that cover prompts alone, and those that two seeds make wide."""
    single = [method.name for method in methods if len(method.best.runs) == 1]
    notes = []
    if len(single) == len(methods):
        notes.append("There is one seed: intervals cover the choice of prompts but not the choice of seeds.")
    elif single:
        notes.append(
            f"One seed of {', '.join(map(quoted, single))}: the interval of its mean covers prompts alone; in a "
            "difference, the variance between seeds is that of the other method."
        )
    if any(len(method.best.runs) == 2 for method in methods):
        notes.append(
            "Two seeds make wide intervals: the variance between seeds then rests on two numbers of each method. Where "
            "seeds differ much, the interval of a mean is 6.5 times as wide as with a known variance, and that of a "
            "difference 2.2 times. With three seeds these are 2.2 and 1.4."
        )
    return notes


def _method(
    name: str, title: str, runs: Sequence[Run], select: str | None, problems: Sequence[Problem], bootstrap: Bootstrap
) -> Method:
    settings = settings_of(runs, select)
    best = best_setting(settings, select)
    return Method(
        name=name,
        title=title,
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
            share = _is_share(name) and scores.shape[1] > 1
            found[name] = bootstrap.share(scores) if share else _bounded(bootstrap.mean(scores), name)
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
        ours, theirs = (score_table(method.best.runs, metric, prompts) for method in (one, two))
        assert ours is not None and theirs is not None, "the metric is one that all runs have"
        paired = one.best.seeds == two.best.seeds
        found.append((one.name, two.name, bootstrap.difference(ours, theirs, paired=paired), paired))
    corrected = _corrected([estimate for _, _, estimate, _ in found])
    return [
        Difference(first, second, estimate, p, paired)
        for (first, second, estimate, paired), p in zip(found, corrected, strict=True)
    ]


def _corrected(estimates: Sequence[Estimate | None]) -> list[float | None]:
    """Return the p-values corrected by the method of Holm; what is not tested does not count."""
    p_values = [None if one is None else one.p for one in estimates]
    corrected = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(corrected) for p in p_values]


def _duels(methods: Sequence[Method], bootstrap: Bootstrap) -> list[Duel]:
    """Return the duels of every two methods in both directions; a pair is one test."""
    pairs = list(combinations(methods, 2))
    estimates = [_duel(one, two, bootstrap) for one, two in pairs]
    duels = [
        Duel(one.name, two.name, estimate, p)
        for (one, two), estimate, p in zip(pairs, estimates, _corrected(estimates), strict=True)
    ]
    return [*duels, *(duel.reversed() for duel in duels)]


def _duel(one: Method, two: Method, bootstrap: Bootstrap) -> Estimate | None:
    ours, theirs = one.best.runs, two.best.runs
    # Every run meets every run of the other method: seeds of both sides move the share.
    met = [[win_shares(run, other) for other in theirs] for run in ours]
    prompts = _common([shares for row in met for shares in row])
    if len(prompts) > 1:
        cube = np.stack([_table(row, prompts) for row in met])
        alike = np.array([[share_random_numbers(run, other) for other in theirs] for run in ours])
        # A run that meets its own random numbers alone is left out, unless all do: such a duel is better than none.
        if not alike.all():
            ours_kept, theirs_kept = ~alike.all(axis=1), ~alike.all(axis=0)
            cube, alike = cube[ours_kept][:, theirs_kept], alike[ours_kept][:, theirs_kept]
            cube[alike] = np.nan
        return bootstrap.share(np.nanmean(cube, axis=1), np.nanmean(cube, axis=0))
    # A judge may have compared runs of equal seeds only.
    if one.best.seeds != two.best.seeds:
        return None
    rows = [row[place] for place, row in enumerate(met)]
    prompts = _common(rows)
    return bootstrap.share(_table(rows, prompts)) if len(prompts) > 1 else None


def _common(rows: Sequence[Mapping[str, float]]) -> list[str]:
    return [prompt for prompt in rows[0] if all(prompt in row for row in rows)]


def _table(rows: Sequence[Mapping[str, float]], prompts: Sequence[str]) -> Array:
    return np.array([[row[prompt] for prompt in prompts] for row in rows], dtype=np.float64)


def _is_share(metric: str) -> bool:
    entry = find(metric)
    return entry is not None and entry.bounds == SHARE


def _bounded(estimate: Estimate, metric: str) -> Estimate:
    """Cut an interval to the range of the metric: few seeds make wide intervals."""
    entry = find(metric)
    if estimate.low is None or estimate.high is None or entry is None or entry.bounds is None:
        return estimate
    lowest, highest = entry.bounds
    return replace(estimate, low=max(estimate.low, lowest), high=min(estimate.high, highest))


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
