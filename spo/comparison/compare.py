"""The comparison itself: each method's best setting, its numbers on the test split, and what differs for sure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from spo.comparison.refusals import Problem, find_problems
from spo.comparison.runs import CannotCompare, Found, Run
from spo.comparison.scores import against, prompts_of, table
from spo.metrics.catalogue import INTERVAL, find, find_logged, label, shown_in
from spo.stats import Bootstrap, Estimate, holm
from spo.wording import number

SELECTORS = ("val/win_rate", "val/reward", "val/rewards/accuracies")
LEVEL = 0.05  # of the tests, after correction
_COEFFICIENTS = ("alpha.value", "beta.value")


@dataclass(frozen=True)
class Setting:
    """One setting of a method, run with some seeds.

    Attributes:
        label: What tells it from the method's others, such as ``alpha 0.1, beta 0.03``.
        values: The same as keys and values.
        runs: Its finished runs, by seed.
        selection: Mean over seeds of what settings are selected by; ``None`` where a run has not recorded it.
    """

    label: str
    values: Mapping[str, Any]
    runs: Sequence[Run]
    selection: float | None

    @property
    def seeds(self) -> list[int]:
        """In the order of the runs."""
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class Method:
    """A method with everything that was tried for it.

    Attributes:
        name: ``method.name``.
        title: Its name for people.
        settings: All of them, as they were tried.
        best: The one that is compared.
        estimates: Numbers of the best setting on the test split by metric, without ``eval/``.
        problems: What makes its numbers less than they seem, where the comparison went on anyway.
    """

    name: str
    title: str
    settings: Sequence[Setting]
    best: Setting
    estimates: Mapping[str, Estimate]
    problems: Sequence[Problem]


@dataclass(frozen=True)
class Difference:
    """Two methods by the main metric.

    Attributes:
        first: Name of a method.
        second: Name of another.
        estimate: Of the first less the second; its interval and p-value are those of this difference alone.
        p: The p-value corrected for the number of differences that are looked at.
        paired: Whether equal seeds of both were compared with each other.
    """

    first: str
    second: str
    estimate: Estimate
    p: float | None
    paired: bool

    @property
    def significant(self) -> bool:
        """Whether it is more than luck would do."""
        return self.p is not None and self.p <= LEVEL


@dataclass(frozen=True)
class Duel:
    """How often one method's completions beat another's, prompt by prompt; ``None`` where nobody has judged them."""

    first: str
    second: str
    estimate: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """Everything the outputs show.

    Attributes:
        methods: By the main metric, the best first.
        differences: Of every two methods, or of each to the baseline.
        duels: Of every two methods, in both directions.
        metric: The main metric, with ``eval/``.
        higher: Whether more of it is better; ``None`` where neither is.
        select: What the best settings were selected by; ``None`` where there was nothing to select.
        baseline: The method that others are compared with, if not each with each.
        reference: Numbers of the model that training started from, by metric.
        prompts: Number of test prompts.
        seeds: Of the runs.
        problems: What makes the comparison unfair, where it went on anyway.
        notes: What else a reader should know.
        bootstrap: How intervals were made.
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
        """The main metric without ``eval/``."""
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
    """Compares the methods of some runs.

    Args:
        found: The runs.
        metric: Key of ``metrics.json`` by which methods are ranked and tested; ``None`` for the win rate, or the
            reward where there is none.
        select: Key on the selection split by which a method's best setting is found; ``None`` for the first of
            ``SELECTORS`` that all runs have.
        baseline: Method with which each other one is compared; ``None`` for all pairs.
        anyway: Whether to go on where the comparison is unfair, saying so everywhere.
        bootstrap: How intervals are made.

    Raises:
        CannotCompare: The comparison would be unfair or there is nothing to compare. All problems are named.
    """
    bootstrap = bootstrap or Bootstrap()
    problems = find_problems(found)
    if problems and not anyway:
        raise CannotCompare([one.text for one in problems], "Put them right, or add --anyway to go on and mark them.")
    runs = [run for run in found.runs if run.failure is None]
    if not runs:
        raise CannotCompare([*(one.text for one in problems), "no run is finished"])
    names = list(dict.fromkeys(run.method for run in runs))
    if baseline is not None and baseline not in names:
        raise CannotCompare([f"--baseline {baseline}: there is no run of it; the methods are {', '.join(names)}"])
    notes = [*found.notes, *(f"{name} has no finished run" for name in _lost(found.runs, names))]
    metric = _metric(runs, metric, notes)
    of_method = {name: [run for run in runs if run.method == name] for name in names}
    selects = any(len({run.key for run in some}) > 1 for some in of_method.values())
    if select is not None and not selects:
        notes.append(f"Nothing was selected by {select}: every method has one setting.")
    select = _selector(runs, select, notes) if selects else None
    methods = [_method(name, some, select, problems, bootstrap) for name, some in of_method.items()]
    main, higher = metric.removeprefix("eval/"), better(metric)
    methods.sort(key=lambda method: (-1 if higher is not False else 1) * _value(method, main))
    seeds = sorted({run.seed for run in runs})
    if len(seeds) == 1:
        notes.append("There is one seed: intervals say how much is luck of the prompts, and nothing about seeds.")
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


def better(key: str) -> bool | None:
    """Whether more of a metric is better (True), less (False), or neither is (None)."""
    entry = find_logged(key)
    return None if entry is None or entry.better is None else entry.better == "higher"


def _lost(runs: Iterable[Run], names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(run.method for run in runs) if name not in names]


def _metric(runs: Sequence[Run], wanted: str | None, notes: list[str]) -> str:
    keys = (key for key in runs[0].record.metrics or {} if key.startswith("eval/") and _describes_policy(key[5:]))
    known = sorted(key for key in keys if all(run.record.metric(key) is not None for run in runs))
    if wanted is not None:
        if wanted in known:
            return wanted
        raise CannotCompare([f"--metric {wanted}: not all runs have it; they share {', '.join(known) or 'no metric'}"])
    if "eval/win_rate" in known:
        return "eval/win_rate"
    if "eval/reward" in known:
        notes.append("Not all runs have a win rate: methods are compared by their reward.")
        return "eval/reward"
    raise CannotCompare(
        ["the runs share neither eval/win_rate nor eval/reward: some were evaluated without a reward and a judge"],
        f"Choose with --metric: {', '.join(known) or 'they share no metric at all'}.",
    )


def _selector(runs: Sequence[Run], wanted: str | None, notes: list[str]) -> str:
    if wanted is not None and wanted.startswith("eval/"):
        raise CannotCompare(
            [f"--select {wanted}: selecting on the test split favours the luckiest setting; use a val/ metric"]
        )
    for key in [wanted] if wanted is not None else SELECTORS:
        if all(run.number(key) is not None for run in runs):
            if wanted is None and key != SELECTORS[0]:
                notes.append(f"Settings were selected by {key}: not all runs have {SELECTORS[0]}.")
            return key
    keys = (key for key in runs[0].record.metrics or {} if key.startswith("val/"))
    known = sorted(key for key in keys if all(run.record.metric(key) is not None for run in runs))
    words = f"--select {wanted}: not all runs have it" if wanted else f"not all runs have one of {', '.join(SELECTORS)}"
    raise CannotCompare([f"{words}, by which the best setting of a method could be selected"], _choice(known))


def _choice(known: Sequence[str]) -> str:
    return f"Choose with --select: {', '.join(known)}." if known else "They share no val/ metric."


def _method(
    name: str, runs: Sequence[Run], select: str | None, problems: Sequence[Problem], bootstrap: Bootstrap
) -> Method:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    varying = _varying(runs)
    settings = [_setting(sorted(some, key=lambda run: run.seed), varying, select) for some in groups.values()]
    settings.sort(key=lambda setting: [_sortable(value) for value in setting.values.values()])
    sign = -1 if select is not None and better(select) is False else 1
    best = max(settings, key=lambda setting: -np.inf if setting.selection is None else sign * setting.selection)
    return Method(
        name=name,
        title=str(runs[0].setting.get("method.title", name)),
        settings=settings,
        best=best,
        estimates=_estimates(best, bootstrap),
        problems=[problem for problem in problems if not problem.methods or name in problem.methods],
    )


def _sortable(value: Any) -> tuple[bool, float, str]:
    plain = isinstance(value, int | float)
    return (not plain, float(value) if plain else 0.0, str(value))


def _varying(runs: Sequence[Run]) -> list[str]:
    """Keys that tell a method's settings apart, without those that only follow from others."""
    keys = dict.fromkeys(key for run in runs for key in run.setting)
    missing = object()
    varying = [key for key in keys if len({str(run.setting.get(key, missing)) for run in runs}) > 1]
    own = [key for key in varying if not all(key in run.follows for run in runs if key in run.setting)]
    return own or varying or [key for key in _COEFFICIENTS if key in keys]


def _setting(runs: Sequence[Run], varying: Sequence[str], select: str | None) -> Setting:
    values = {key: runs[0].setting[key] for key in varying if key in runs[0].setting}
    numbers = [run.number(select) for run in runs] if select else []
    known = [one for one in numbers if one is not None]
    words = ", ".join(f"{_key(key)} {_plain(value)}" for key, value in values.items())
    return Setting(words or "as it is", values, runs, fmean(known) if known and len(known) == len(runs) else None)


def _key(key: str) -> str:
    return key.removesuffix(".value").removesuffix("._target_")


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value.rpartition(".")[2] if isinstance(value, str) and value.startswith("spo.") else str(value)


def _value(method: Method, metric: str) -> float:
    return method.estimates[metric].value


def _describes_policy(name: str) -> bool:
    """Return whether a metric is a number of the policy, not one of the reference, an interval or a count."""
    entry = find(name)
    return not name.startswith("reference/") and not name.endswith(INTERVAL) and (entry is None or entry.of_policy)


def _estimates(setting: Setting, bootstrap: Bootstrap) -> dict[str, Estimate]:
    shared = set.intersection(*(set(run.record.metrics or {}) for run in setting.runs))
    names = [key.removeprefix("eval/") for key in sorted(shared) if key.startswith("eval/")]
    found = {}
    for name in names:
        scores = table(setting.runs, name, prompts_of(setting.runs, name)) if _describes_policy(name) else None
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
        prompts = prompts_of([*one.best.runs, *two.best.runs], metric)
        first, second = (table(method.best.runs, metric, prompts) for method in (one, two))
        assert first is not None and second is not None, "the metric is one that all runs have"
        paired = one.best.seeds == two.best.seeds
        found.append((one.name, two.name, bootstrap.difference(first, second, paired=paired), paired))
    # A difference that nothing can be said about takes no part in the correction.
    tested = [estimate.p for _, _, estimate, _ in found if estimate.p is not None]
    corrected = iter(holm(tested))
    return [
        Difference(first, second, estimate, None if estimate.p is None else next(corrected), paired)
        for first, second, estimate, paired in found
    ]


def _duel(one: Method, two: Method, bootstrap: Bootstrap) -> Duel:
    paired = one.best.seeds == two.best.seeds
    rows = [
        _mean([against(run, other) for other in ([two.best.runs[place]] if paired else two.best.runs)])
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
    """Cuts an interval where the metric cannot be: few seeds make wide ones."""
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


def describe_difference(difference: Difference, comparison: Comparison) -> str:
    """What a difference says, and no more than that."""
    name = label(comparison.metric_name)
    if difference.p is None:
        return f"{difference.first} and {difference.second}: too few numbers to say anything of the difference."
    if not difference.significant:
        return f"{difference.first} and {difference.second}: no difference in {name} is shown ({_with_p(difference)})."
    ahead, behind = difference.first, difference.second
    more = difference.estimate.value > 0
    if not more and comparison.baseline is None:
        ahead, behind, more = behind, ahead, True
    good = comparison.higher is not None
    word = ("better" if more == comparison.higher else "worse") if good else ("higher" if more else "lower")
    return f"{ahead} is {word} than {behind} in {name} ({_with_p(difference)})."


def _with_p(difference: Difference) -> str:
    estimate = difference.estimate
    size = number(abs(estimate.value)) if difference.significant else number(estimate.value, signed=True)
    return f"{size}, {describe_p_value(difference.p)}"


def describe_p_value(p: float | None) -> str:
    """Writes a p-value: small ones as a bound, since resampling cannot tell them apart."""
    if p is None:
        return "no test"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
