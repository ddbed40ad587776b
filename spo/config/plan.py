"""What a command line asks for: its overrides read, its jobs composed and checked, before any of them starts."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from spo.config import search_space
from spo.config.checks import missing_and_unresolved, problems
from spo.config.compose import composer, directory, expand_numbers, parse, parser
from spo.config.groups import group_members
from spo.config.nodes import (
    DIRECTIVES,
    first_line,
    in_target,
    keys_of,
    listed,
    suggestion,
)
from spo.errors import ConfigProblems, UserError, missing_package
from spo.resources import conf_dir


@dataclass(frozen=True)
class Job:
    """One run: its overrides, and what they compose to (``paths.run`` set)."""

    overrides: list[str]
    cfg: DictConfig


@dataclass(frozen=True)
class Plan:
    """What a command line asks for.

    Attributes:
        overrides: the command line's, numbers for alpha and beta written out.
        jobs: the runs; of a sweeper that proposes its jobs one by one, only a first one.
        complete: whether ``jobs`` are all there will be.
        multirun: whether they are jobs of a multirun.
        sweep_dir: the directory of the multirun.
    """

    overrides: list[str]
    jobs: list[Job]
    multirun: bool
    complete: bool
    sweep_dir: Path

    def named_jobs(self) -> list[tuple[list[str], str]]:
        """Overrides of each job, without Hydra's own, and the name of its directory; none of an incomplete plan."""
        tasks = [[text for text in job.overrides if not parse(text).is_hydra_override()] for job in self.jobs]
        names = [directory(task, job.cfg) for task, job in zip(tasks, self.jobs, strict=True)]
        return list(zip(tasks, names, strict=True)) if self.complete else []


def plan(
    overrides: Sequence[str], *, multirun: bool = False, config_dir: str | Path | None = None, complete: bool = True
) -> Plan:
    """Reads a command line and checks every run it asks for.

    Args:
        overrides: as typed.
        multirun: whether ``-m`` was given.
        config_dir: folder with further members of the groups.
        complete: false checks only that the overrides can be used, not what they amount to.

    Raises:
        ConfigProblems: with everything that is wrong in any of the jobs.
        UserError: the folder of further members does not exist.
    """
    found: list[str] = []
    usable = _readable(overrides, found)
    with composer(config_dir) as composed:
        composing = _Composing(composed, config_dir)
        single = [_first_value(override) for override in usable]
        first_said: list[str] = []
        first, first_unsure = composing.compose(single, first_said)
        multirun = multirun or first.hydra.mode == RunMode.MULTIRUN
        with open_dict(first):  # the sweep is named after all values, of which only the first are composed here
            first.hydra.overrides.task = [text for text in usable if not parse(text).is_hydra_override()]
        sweep_dir = Path(str(first.hydra.sweep.dir)).absolute()
        if not multirun:
            several = [override for override in usable if parse(override).is_sweep_override()]
            found += [f"{o}: has several values; add -m for one run each, or write a list as [..]" for o in several]
            lists = [single]
        else:
            lists = _expand(usable, first, found) or [single]
        per_job: list[list[str]] = []
        jobs: list[Job] = []
        for job_overrides in lists:
            if job_overrides == single:
                said, cfg, unsure = list(first_said), copy.deepcopy(first), first_unsure
            else:
                said = []
                cfg, unsure = composing.compose(job_overrides, said)
            certain = not unsure and not (multirun and said)  # the other jobs tell the rest
            said += composing.unread(cfg, job_overrides) if complete else []
            run_dir = str(Path(str(cfg.hydra.run.dir)).absolute())
            with open_dict(cfg):
                del cfg["hydra"]
            cfg.paths.run = run_dir
            if complete:
                said += problems(cfg) if certain else missing_and_unresolved(cfg)
            per_job.append(said)
            jobs.append(Job(job_overrides, cfg))
    found += [problem for problem in _over_jobs(per_job, lists) if problem not in found]
    if found:
        raise ConfigProblems(list(dict.fromkeys(found)))
    return Plan(usable, jobs, multirun, not multirun or _is_grid(first), sweep_dir)


def _readable(overrides: Sequence[str], found: list[str]) -> list[str]:
    usable: list[str] = []
    for override in overrides:
        try:
            parse(override)
            usable += expand_numbers([override])
        except UserError as error:
            found.append(str(error))
    return usable


def _first_value(text: str) -> str:
    override = parse(text)
    if not override.is_sweep_override():
        return text
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.start}"
    override.config_loader = parser().config_loader
    return f"{override.get_key_element()}={next(override.sweep_string_iterator(), 'null')}"


def _expand(overrides: Sequence[str], cfg: DictConfig, found: list[str]) -> list[list[str]]:
    """The jobs of a multirun, as Hydra's own sweeper makes them; of a search, those at the ends of its ranges."""
    sweeper = cfg.hydra.sweeper
    own = [text for text in overrides if parse(text).is_hydra_override()]
    if sweeper.get("_target_") == search_space.TARGET:
        if importlib.util.find_spec("optuna") is None:
            found.append(str(missing_package("optuna")))
            return []
        said, space = search_space.problems(cfg, overrides)
        found += said
        return [] if space is None else [[*own, *job] for job in space.corners()]
    if not _is_grid(cfg):
        return []
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    task = [text for text in [*params, *overrides] if not parse(text).is_hydra_override()]
    [jobs] = BasicSweeper.split_arguments(parser().parse_overrides(task), None)
    return [[*own, *job] for job in jobs]


def _is_grid(cfg: DictConfig) -> bool:
    return str(cfg.hydra.sweeper.get("_target_")).endswith(".BasicSweeper")


def _over_jobs(per_job: list[list[str]], lists: list[list[str]]) -> Iterator[str]:
    """Problems of all jobs once each; with the job where only some have it."""
    for problem in dict.fromkeys(itertools.chain.from_iterable(per_job)):
        having = [job for job, said in zip(lists, per_job, strict=True) if problem in said]
        if len(having) == len(lists):
            yield problem
        else:
            others = f" and {len(having) - 1} more" if len(having) > 1 else ""
            yield f"{problem} [job {' '.join(having[0])}{others}]"


class _Composing:
    """Composes with Hydra, which stops at its first bad override, and finds all of them."""

    def __init__(self, composed: Callable[[Sequence[str]], DictConfig], config_dir: str | Path | None) -> None:
        self.composed = composed
        self.folders = [Path(config_dir).absolute()] if config_dir is not None else []
        self.folders.append(conf_dir())
        self.groups = group_members(self.folders)
        self._baselines: dict[tuple[tuple[str, str], ...], set[str]] = {}

    def compose(self, overrides: Sequence[str], found: list[str]) -> tuple[DictConfig, bool]:
        """What the usable ones of the overrides compose to; the others are added to ``found``.

        Returns:
            The configuration, and whether too little was usable to judge it.
        """
        try:
            return self.composed(overrides), False
        except (HydraException, OmegaConfBaseException, ValueError):
            pass
        accepted: list[str] = []
        dropped: set[str] = set()
        cfg = self.composed([])
        # Groups first: what keys exist depends on them. Each is tried on top of those that are fine.
        for text in sorted(overrides, key=lambda text: not self._is_group(parse(text))):
            override = parse(text)
            if override.key_or_group.partition(".")[0] in dropped:
                continue
            try:
                cfg = self.composed([*accepted, text])
                accepted.append(text)
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                found.append(f"{text}: {self._words(override, cfg, error)}")
                if not self._is_group(override):
                    continue
                # Further problems are looked for as if the right member had been named.
                for repaired in self._repaired(override):
                    try:
                        cfg = self.composed([*accepted, repaired])
                        accepted.append(repaired)
                        break
                    except (HydraException, OmegaConfBaseException, ValueError):
                        continue
                else:
                    dropped.add(override.key_or_group)
        return cfg, bool(dropped)

    def _is_group(self, override: Override) -> bool:
        return override.key_or_group in self.groups or "/" in override.key_or_group

    def _repaired(self, override: Override) -> list[str]:
        group = override.key_or_group
        members = difflib.get_close_matches(str(override.value()), self.groups.get(group, []), n=1)
        return [f"{plus}{group}={member}" for member in members for plus in ("", "+")]

    def _words(self, override: Override, cfg: DictConfig, error: Exception) -> str:
        key, text = override.key_or_group, str(error)
        if plugin := re.search(r"Could not find 'hydra/(launcher|sweeper)/(\w+)'", text):
            name = {"submitit_slurm": "submitit"}.get(plugin[2], plugin[2])
            if words := missing_package(f"hydra_plugins.hydra_{name}_{plugin[1]}"):
                return words
        members = self.groups.get(key)
        if members is not None:
            if f"+{key}=" in text and override.type is OverrideType.CHANGE:
                return f"write it with a plus, +{override.input_line}"
            known = f"the group has {listed(members)}" if members else "it has no members"
            if str(override.value()) not in members:
                return f"no such member of {key}{suggestion(str(override.value()), members)}; {known}"
        if override.is_delete():
            return "there is nothing to delete"
        if "Could not append" in text:
            return f"the key exists already; write {str(override.input_line).lstrip('+')}"
        if "Could not override" in text or "is not in struct" in text:
            return f"unknown key{_key_suggestion(key, cfg, self.groups)}"
        return first_line(error)

    def unread(self, cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
        """Keys that were added, by ``+`` or in a preset, and that nothing reads."""
        choices = {
            str(group): str(member)
            for group, member in cfg.hydra.runtime.choices.items()
            if member is not None and not str(group).startswith("hydra/")
        }
        presets = {group for group, member in choices.items() if self._is_preset(group, member)}
        if not presets and not any(text.startswith("+") for text in overrides):
            return []
        known = self._keys_of({group: member for group, member in choices.items() if group not in presets})
        raw = OmegaConf.to_yaml(cfg)
        found: list[str] = []
        for key in sorted(keys_of(cfg) - known):
            parent = key.rpartition(".")[0]
            if any(key.startswith(f"{reported.partition(':')[0]}.") for reported in found):
                continue
            if in_target(cfg, key) or f"${{{key}" in raw or _is_open(known, parent):
                continue
            found.append(f"{key}: nothing reads this key{suggestion(key, sorted(known))}")
        return found

    def _is_preset(self, group: str, member: str) -> bool:
        files = (folder / group / f"{member}.yaml" for folder in self.folders)
        return any(file.is_file() and re.search(r"^# *@package _global_", file.read_text(), re.M) for file in files)

    def _keys_of(self, choices: dict[str, str]) -> set[str]:
        frozen = tuple(sorted(choices.items()))
        if frozen not in self._baselines:
            default = self.composed([]).hydra.runtime.choices
            chosen = [f"{group}={member}" if group in default else f"+{group}={member}" for group, member in frozen]
            self._baselines[frozen] = keys_of(self.composed(chosen))
        return self._baselines[frozen]


def _is_open(known: set[str], parent: str) -> bool:
    """Whether a mapping takes whatever keys it is given: the loggers, the callbacks, one that is empty by default."""
    return parent in ("logger", "callbacks") or (parent in known and not any(k.startswith(f"{parent}.") for k in known))


def _key_suggestion(key: str, cfg: DictConfig, groups: Iterable[str]) -> str:
    keys = keys_of(cfg) | set(groups)
    parent, _, leaf = key.rpartition(".")
    siblings = sorted(known.rpartition(".")[2] for known in keys if parent and known.rpartition(".")[0] == parent)
    if close := difflib.get_close_matches(leaf, siblings, n=1):
        return f"; did you mean {parent}.{close[0]}?"
    if siblings:
        return f"; {parent} has {', '.join(name for name in siblings if name not in DIRECTIVES)}"
    same_leaf = sorted(known for known in keys if known.rpartition(".")[2] == leaf)
    return f"; did you mean {listed(same_leaf[:4])}?" if same_leaf else suggestion(key, sorted(keys))
