"""Choices of a comparison: the metric, the selector, the settings of each method and the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from spo.comparison.runs import CannotCompare, Run
from spo.metrics.catalogue import INTERVAL_ENDS, find, find_logged
from spo.wording import finite, value_text

# Keys by which the best setting is selected, the first that all runs have.
SELECTORS = ("val/win_rate", "val/reward", "val/rewards/accuracies")
_COEFFICIENTS = ("alpha.value", "beta.value")
# Values of a key from which on a best value has neighbors on both sides somewhere.
_MIN_TRIED = 3


@dataclass(frozen=True)
class Setting:
    """A setting of a method, run with one seed or several.

    Attributes:
        label: Keys and values that tell it from the method's other settings, such as ``alpha 0.1, beta 0.03``.
        values: The same keys and values as a mapping.
        runs: Finished runs of the setting, by seed.
        selection: Mean over seeds of the metric that settings are selected by; ``None`` where a run lacks it.
    """

    label: str
    values: Mapping[str, Any]
    runs: Sequence[Run]
    selection: float | None

    @property
    def seeds(self) -> list[int]:
        """Return the seeds in the order of the runs."""
        return [run.seed for run in self.runs]


def better(key: str) -> bool | None:
    """Return whether more of a metric is better (True), less is better (False), or neither is (None).

    Args:
        key: Key as it is logged, such as ``eval/kl``.
    """
    entry = find_logged(key)
    return None if entry is None or entry.better is None else entry.better == "higher"


def describes_policy(name: str) -> bool:
    """Return whether a metric is a number of the policy, not one of the reference, an interval or a count.

    Args:
        name: Key without ``eval/``.
    """
    entry = find(name)
    return not name.startswith("reference/") and not name.endswith(INTERVAL_ENDS) and (entry is None or entry.of_policy)


def choose_metric(runs: Sequence[Run], wanted: str | None, notes: list[str]) -> str:
    """Choose the metric by which methods are ranked and tested.

    Args:
        runs: Finished runs.
        wanted: Key that the user asked for; ``None`` for the win rate, or for the reward if runs lack a win rate.
        notes: Sentences for the reader, to which a fallback is added.

    Raises:
        CannotCompare: If the runs do not share the metric.
    """
    keys = (key for key in runs[0].record.metrics or {} if key.startswith("eval/") and describes_policy(key[5:]))
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


def choose_selector(runs: Sequence[Run], wanted: str | None, notes: list[str]) -> str:
    """Choose the metric of the selection split by which the best setting of a method is found.

    Args:
        runs: Finished runs.
        wanted: Key that the user asked for; ``None`` for the first of ``SELECTORS`` that all runs have.
        notes: Sentences for the reader, to which a fallback is added.

    Raises:
        CannotCompare: If the runs do not share the metric, or it belongs to the test split.
    """
    if wanted is not None and wanted.startswith("eval/"):
        raise CannotCompare(
            [f"--select {wanted}: selecting on the test split favors the luckiest setting; use a val/ metric"]
        )
    for key in [wanted] if wanted is not None else SELECTORS:
        if all(run.number(key) is not None for run in runs):
            if wanted is None and key != SELECTORS[0]:
                notes.append(f"Settings were selected by {key}: not all runs have {SELECTORS[0]}.")
            if better(key) is None:
                notes.append(f"Settings were selected by the largest {key}, whose better direction is unknown.")
            return key
    keys = (key for key in runs[0].record.metrics or {} if key.startswith("val/"))
    known = sorted(key for key in keys if all(run.record.metric(key) is not None for run in runs))
    words = f"--select {wanted}: not all runs have it" if wanted else f"not all runs have one of {', '.join(SELECTORS)}"
    advice = f"Choose with --select: {', '.join(known)}." if known else "They share no val/ metric."
    raise CannotCompare([f"{words}, by which the best setting of a method could be selected"], advice)


def settings_of(runs: Sequence[Run], select: str | None) -> list[Setting]:
    """Group the runs of a method by setting, in the order of the values that differ.

    Args:
        runs: Finished runs of one method.
        select: Metric that settings are selected by; ``None`` if there is nothing to select.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.key, []).append(run)
    varying = _varying_keys(runs)
    settings = [_setting(sorted(some, key=lambda run: run.seed), varying, select) for some in groups.values()]
    settings.sort(key=lambda setting: [value_order(value) for value in setting.values.values()])
    return settings


def best_setting(settings: Sequence[Setting], select: str | None) -> Setting:
    """Return the setting with the best mean over seeds; the first one where nothing is selected by.

    Args:
        settings: Settings of one method, at least one.
        select: Metric that settings are selected by.
    """
    sign = -1 if select is not None and better(select) is False else 1
    return max(settings, key=lambda setting: -np.inf if setting.selection is None else sign * setting.selection)


def edges(name: str, settings: Sequence[Setting], best: Setting) -> list[str]:
    """Describe keys whose value in the best setting is the smallest or the largest of at least three that were tried.

    Of two values either is on an edge, so a key with two values is not described. Neither is a seed, which does not
    have an order, nor a smallest value of zero or of one as a count, below which there is nothing to try.

    Args:
        name: Name of the group of the settings.
        settings: Settings that were tried.
        best: Setting that was selected.
    """
    found = []
    for key, value in best.values.items():
        numbers = [finite(setting.values.get(key)) for setting in settings]
        tried = {number for number in numbers if number is not None}
        if finite(value) is None or len(tried) < _MIN_TRIED or key.rpartition(".")[2].endswith("seed"):
            continue
        is_lowest_possible = value == 0 or (value == 1 and isinstance(value, int))
        end = "largest" if value == max(tried) else "smallest" if value == min(tried) else ""
        if end and not (end == "smallest" and is_lowest_possible):
            found.append(
                f"The best setting of {name} has the {end} {short_key(key)} that was tried ({value_text(value)}): the "
                "optimum may lie beyond it."
            )
    return found


def value_order(value: Any) -> tuple[bool, float, str]:
    """Return a sort key that puts numbers first, by size, and then everything else, by its text."""
    plain = isinstance(value, int | float)
    return not plain, float(value) if plain else 0.0, str(value)


def short_key(key: str) -> str:
    """Shorten a key of the configuration for people: ``alpha.value`` becomes ``alpha``."""
    return key.removesuffix(".value").removesuffix("._target_")


def _varying_keys(runs: Sequence[Run]) -> list[str]:
    """Return the keys that tell a method's settings apart, without those that only follow from others."""
    keys = dict.fromkeys(key for run in runs for key in run.setting)
    missing = object()
    varying = [key for key in keys if len({str(run.setting.get(key, missing)) for run in runs}) > 1]
    own = [key for key in varying if not all(key in run.follows for run in runs if key in run.setting)]
    return own or varying or [key for key in _COEFFICIENTS if key in keys]


def _setting(runs: Sequence[Run], varying: Sequence[str], select: str | None) -> Setting:
    values = {key: runs[0].setting[key] for key in varying if key in runs[0].setting}
    numbers = [run.number(select) for run in runs] if select else []
    known = [one for one in numbers if one is not None]
    words = ", ".join(f"{short_key(key)} {value_text(value)}" for key, value in values.items())
    return Setting(words or "as it is", values, runs, fmean(known) if known and len(known) == len(runs) else None)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other point beats, for a cost (less is better) and a gain (more is better).

    Args:
        points: Cost and gain of each point.

    Returns:
        Positions of the points, from the least cost to the largest gain.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front
