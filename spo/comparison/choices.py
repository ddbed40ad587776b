"""Members of config groups that runs chose, such as ``local_kl`` of ``regularizer``, found in what runs record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from spo.comparison.runs import Run
from spo.records.files import flatten, load_yaml
from spo.resources import conf_dir

_TARGET = "_target_"
# An override that chooses a member: plain numbers of alpha and beta, lists and null do not.
_CHOICE = re.compile(r"\+{0,2}([\w/]+)=(?!null$)([A-Za-z_][\w/.-]*)")
# A value that a yaml file leaves to the user.
_MISSING = "???"


def config_groups(runs: Iterable[Run]) -> list[str]:
    """Return the config groups that the configurations of the runs contain."""
    parts = dict.fromkeys(key.partition(".")[0] for run in runs for key in run.config if "." in key)
    return [part for part in parts if (conf_dir() / part).is_dir()]


def members(runs: Sequence[Run], group: str) -> dict[Run, str | None]:
    """Return the member of a config group that each run chose.

    A run does not record its choices as such. The overrides name a member that the user chose. Otherwise it is the
    shipped member with the targets of the run and the most equal values. A member from a folder of the user that no
    override names has the name that another run gives to the same targets, or that of its class.

    Args:
        runs: Runs to read.
        group: Config group, such as ``regularizer``.

    Returns:
        The members by run; ``None`` for a run that does not read the group, as DPO does not read alpha.
    """
    if group == "method":
        return {run: run.method for run in runs}
    nodes = {run: _node(run, group) for run in runs}
    names: dict[frozenset[tuple[str, str]], set[str]] = {}
    for run in runs:
        if name := chosen_member(run, group):
            names.setdefault(targets(run, group), set()).add(name)
    found: dict[Run, str | None] = {}
    for run, node in nodes.items():
        alike = sorted(names.get(targets(run, group), ()))
        known = chosen_member(run, group) or _shipped_member(group, node) or (alike[0] if len(alike) == 1 else None)
        found[run] = (known or _class_name(node)) if node else None
    return found


def chosen_member(run: Run, group: str) -> str | None:
    """Return the member that the overrides of a run name, ``None`` where they do not choose one."""
    found = [choice[2] for text in run.overrides if (choice := _CHOICE.fullmatch(text)) and choice[1] == group]
    return found[-1] if found else None


def targets(run: Run, group: str) -> frozenset[tuple[str, str]]:
    """Return the classes of a run's member of a config group, by key."""
    return frozenset(_targets(_node(run, group)).items())


def _node(run: Run, group: str) -> dict[str, str]:
    """Return the keys of a group, with interpolations where they are recorded; none if the run does not read it."""
    parts = [
        {key.partition(".")[2]: str(value) for key, value in flat.items() if key.startswith(f"{group}.")}
        for flat in (run.composed, run.config)
    ]
    return (parts[0] or parts[1]) if parts[1] else {}


def _targets(node: Mapping[str, str]) -> dict[str, str]:
    return {key: text for key, text in node.items() if key.rpartition(".")[2] == _TARGET}


def _class_name(node: Mapping[str, str]) -> str:
    found = _targets(node)
    return found.get(_TARGET, next(iter(found.values()), "other")).rpartition(".")[2]


def _shipped_member(group: str, node: Mapping[str, str]) -> str | None:
    found, most = None, -1
    for name, member in _members(group).items():
        wanted, has = _targets(member), _targets(node)
        fits = wanted.keys() == has.keys() and all(text in (has[key], _MISSING) for key, text in wanted.items())
        equal = sum(node.get(key) == text for key, text in member.items())
        if fits and equal > most:
            found, most = name, equal
    return found


@cache
def _members(group: str) -> dict[str, dict[str, str]]:
    """Return the flat content of each shipped member of a group."""
    folder = conf_dir() / group
    return {
        file.stem: {key: str(value) for key, value in flatten(_content(file)).items()}
        for file in sorted(folder.glob("*.yaml"))
        if file.stem != "common"
    }


def _content(file: Path) -> dict[str, Any]:
    """Return a yaml file with what its defaults list takes from the same folder."""
    try:
        own = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    if not isinstance(own, dict):
        return {}
    content: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            content |= _content(file.with_name(f"{entry}.yaml"))
    return content | own
