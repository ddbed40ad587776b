"""Groups of a comparison: what is compared with what, by method or by any other keys."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spo.comparison.choice import short_key
from spo.comparison.choices import chosen_member, config_groups, members, targets
from spo.comparison.runs import CannotCompare, Run, followers
from spo.records.operational_keys import is_in
from spo.wording import value_text

METHOD = "method"
_METHODS = (METHOD, f"{METHOD}.name")
# Runs are judged in one way, even if they are grouped by the judge.
_NEVER_FREE = ("judge",)


@dataclass(frozen=True)
class Groups:
    """Groups of runs, each with a short name.

    Attributes:
        by: Keys that the user named; empty for groups by method and by choices that differ between runs of a method.
        choices: Config groups beside the method whose members tell the groups of a method apart.
        names: Name of each run's group.
        titles: Name of each run's group for people, with the title of the method.
        values: Values of the keys ``by``, for each run.
    """

    by: tuple[str, ...]
    choices: tuple[str, ...]
    names: Mapping[Run, str]
    titles: Mapping[Run, str]
    values: Mapping[Run, Mapping[str, Any]]

    @property
    def noun(self) -> str:
        """Return the word for a group of runs."""
        return "group" if self.by else "method"

    def bucket(self, run: Run, parts: Collection[str]) -> str:
        """Return a text that is equal for runs with the same values of the keys ``by`` in parts of the configuration.

        Args:
            run: Run to describe.
            parts: Parts of the configuration, such as ``data``.
        """
        values = {key: value for key, value in self.values[run].items() if key.partition(".")[0] in parts}
        return json.dumps(values, sort_keys=True, default=str)

    def is_free(self, key: str, runs: Sequence[Run]) -> bool:
        """Return whether a key may differ between groups, because it is one of ``by`` or follows from one.

        Args:
            key: Key of the configuration.
            runs: Runs that are compared.
        """
        having = [run for run in runs if key in run.setting]
        return key.partition(".")[0] not in _NEVER_FREE and all(is_in(key, self._free[run]) for run in having)

    @cached_property
    def _free(self) -> Mapping[Run, frozenset[str]]:
        return {run: followers(run.composed, self.by) if self.by else frozenset() for run in self.names}


def group_runs(runs: Sequence[Run], by: str | Sequence[str] = ()) -> Groups:
    """Group runs by the values of keys, or by what the user chose.

    Without keys, a group is a method. Where runs of a method have different members of a config group, such as two
    regularizers, each member is a group of its own.

    Args:
        runs: Runs to group, finished or not.
        by: Keys of the flat configuration, and config groups, which count by their chosen member; a list, or a text
            with commas.

    Raises:
        CannotCompare: No run has one of the keys, or a key tells seeds apart and not groups.
    """
    keys = tuple(dict.fromkeys(key.strip() for key in (by.split(",") if isinstance(by, str) else by)))
    if keys:
        return _by_keys(runs, keys)
    of_method: dict[str, list[Run]] = {}
    for run in runs:
        of_method.setdefault(run.method, []).append(run)
    known = {group: members(runs, group) for group in config_groups(runs) if group != METHOD}
    split = {name: _choices(some, known) for name, some in of_method.items()}
    values = {run: {METHOD: run.method, **{group: known[group][run] for group in split[run.method]}} for run in runs}
    choices = tuple(dict.fromkeys(group for some in split.values() for group in some))
    return Groups((), choices, *_names_and_titles(values), {run: {} for run in runs})


def _choices(runs: Sequence[Run], known: Mapping[str, Mapping[Run, str | None]]) -> list[str]:
    """Return the config groups that tell runs of a method apart, without those that only follow from others."""
    named = [group for group in known if any(chosen_member(run, group) for run in runs)]
    varying = []
    for group, member in known.items():
        # A run that does not read a group, such as beta without a regularizer, did not choose another member.
        having = [run for run in runs if member[run] is not None]
        if (
            len({member[run] for run in having}) > 1
            and len({_content(run, group) for run in having}) > 1
            # Members of equal classes are told apart by their values, which the user may have changed.
            and (group in named or len({targets(run, group) for run in having}) > 1)
        ):
            varying.append(group)
    found: list[str] = []
    for group in sorted(varying, key=lambda one: one not in named):
        finer = len({tuple(known[one][run] for one in [*found, group]) for run in runs})
        if group in named or finer > len({tuple(known[one][run] for one in found) for run in runs}):
            found.append(group)
    return sorted(found, key=varying.index)


def _content(run: Run, group: str) -> str:
    values = {key: value for key, value in run.setting.items() if key.startswith(f"{group}.")}
    return json.dumps(values, sort_keys=True, default=str)


def _by_keys(runs: Sequence[Run], by: tuple[str, ...]) -> Groups:
    groups = config_groups(runs)
    keys = {key for run in runs for key in run.config}
    of_seed = {key for key in keys if any(is_in(key, run.of_seed) for run in runs)}
    problems = [
        f"--by {key}: runs of other seeds repeat a group, and are not groups of their own"
        if key in of_seed
        else f"--by {key}: no run has this key{_suggestion(key, [*groups, *sorted(keys - of_seed)])}"
        for key in by
        if key not in groups and key not in keys - of_seed
    ]
    if problems:
        advice = f"A key is a config group ({', '.join(groups)}) or a key of config.yaml, such as optimizer.lr."
        raise CannotCompare(problems, advice)
    known = {key: members(runs, key) if key in groups else _values(runs, key) for key in by}
    values = {run: {key: of_run[run] for key, of_run in known.items()} for run in runs}
    return Groups(by, (), *_names_and_titles(values), values)


def _values(runs: Sequence[Run], key: str) -> dict[Run, Any]:
    """Return the value of a key for each run, ``None`` for a run that does not have the key."""
    return {run: "null" if key in run.config and run.config[key] is None else run.config.get(key) for run in runs}


def _suggestion(word: str, keys: Sequence[str]) -> str:
    same_end = [key for key in keys if key.rpartition(".")[2] == word.rpartition(".")[2]]
    close = (same_end or difflib.get_close_matches(word, keys, n=3))[:3]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _names_and_titles(values: Mapping[Run, Mapping[str, Any]]) -> tuple[dict[Run, str], dict[Run, str]]:
    """Write the values of each group as a short name and as a title; as all keys with their values if names clash."""
    # A word that is a value of several keys, such as `constant`, does not tell the key.
    pairs = {(key, str(value)) for of_run in values.values() for key, value in of_run.items()}
    shared = {word for word, count in Counter(word for _, word in pairs).items() if count > 1} | {"none"}
    names: dict[Run, str] = {}
    titles: dict[Run, str] = {}
    for run, of_run in values.items():
        parts = {key: _part(key, value, shared) for key, value in of_run.items() if value is not None}
        names[run] = ", ".join(parts.values())
        title = str(run.setting.get("method.title", run.method))
        titles[run] = ", ".join(title if key in _METHODS else part for key, part in parts.items())
    groups = {run: json.dumps(of_run, sort_keys=True, default=str) for run, of_run in values.items()}
    if all(names.values()) and len(set(names.values())) == len(set(groups.values())):
        return names, titles
    names = {run: ", ".join(f"{key} {value}" for key, value in of_run.items()) for run, of_run in values.items()}
    return names, names


def _part(key: str, value: Any, shared: Collection[str]) -> str:
    if key in _METHODS:
        return str(value)
    is_member = "." not in key and str(value) not in shared
    return value_text(value) if is_member else f"{short_key(key)} {value_text(value)}"
