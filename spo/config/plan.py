"""Plan of a command line: its overrides read, its jobs composed and checked, before any of them starts."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from spo.config import search_space
from spo.config.checks import code_problems, missing_and_unresolved, quick_problems
from spo.config.compose import composer, directory, expand_numbers, fill_empty_groups, parse, parser
from spo.config.tolerant import TolerantComposer
from spo.errors import ConfigProblems, UserError, missing_package


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        overrides: Overrides of the run, in Hydra's grammar.
        cfg: Configuration without Hydra's node, ``paths.run`` set.
    """

    overrides: list[str]
    cfg: DictConfig


@dataclass(frozen=True)
class Plan:
    """Everything that a command line asks for.

    Attributes:
        overrides: Overrides of the command line, numbers for alpha and beta written out.
        jobs: Runs in order; a first one alone if a sweeper proposes them one by one.
        multirun: Whether the runs are jobs of a multirun.
        complete: Whether ``jobs`` are all there will be.
        sweep_dir: Directory of the multirun.
        composed: Configuration of the first job with Hydra's node.
    """

    overrides: list[str]
    jobs: list[Job]
    multirun: bool
    complete: bool
    sweep_dir: Path
    composed: DictConfig

    def named_jobs(self) -> list[tuple[list[str], str]]:
        """Return the overrides of each job, without Hydra's own, and the name of its directory.

        A plan that is not complete returns none: its jobs are not known yet.
        """
        tasks = [[text for text in job.overrides if not parse(text).is_hydra_override()] for job in self.jobs]
        names = [directory(task, job.cfg) for task, job in zip(tasks, self.jobs, strict=True)]
        return list(zip(tasks, names, strict=True)) if self.complete else []


def plan(overrides: Sequence[str], *, multirun: bool = False, config_dir: str | Path | None = None) -> Plan:
    """Read a command line and check every run it asks for, see :func:`compose_plan` and :func:`check_plan`."""
    planned = compose_plan(overrides, multirun=multirun, config_dir=config_dir)
    check_plan(planned)
    return planned


def compose_plan(
    overrides: Sequence[str], *, multirun: bool = False, config_dir: str | Path | None = None, runs: bool = True
) -> Plan:
    """Read a command line, compose every run it asks for, and check what needs no import of the code that runs.

    Args:
        overrides: Overrides as typed.
        multirun: Whether ``-m`` was given.
        config_dir: Folder with further members of the groups.
        runs: Whether the jobs are to run. If not, values may be missing or wrong, and only overrides are checked.

    Raises:
        ConfigProblems: Everything that the quick checks find in any of the jobs.
        UserError: The folder of further members does not exist.
    """
    problems: list[str] = []
    usable = _readable(overrides, problems)
    with composer(config_dir) as compose:
        tolerant = TolerantComposer(compose, config_dir)
        single = [_first_value(override) for override in usable]
        first_problems: list[str] = []
        first, first_unsure = tolerant.compose(single, first_problems)
        multirun = multirun or first.hydra.mode == RunMode.MULTIRUN
        with open_dict(first):  # The sweep is named after all values; only the first of each is composed here.
            first.hydra.overrides.task = [text for text in usable if not parse(text).is_hydra_override()]
        sweep_dir = Path(str(first.hydra.sweep.dir)).absolute()
        if not multirun:
            first.hydra.run.dir = str(first.hydra.run.dir)  # Its time stamp must not move on until the run starts.
            several = [override for override in usable if parse(override).is_sweep_override()]
            problems += [f"{o}: has several values; add -m for one run each, or write a list as [..]" for o in several]
            lists = [single]
        else:
            lists = _expand(usable, first, problems) or [single]
        per_job: list[list[str]] = []
        jobs: list[Job] = []
        for job_overrides in lists:
            if job_overrides == single:
                job_problems, cfg, unsure = list(first_problems), copy.deepcopy(first), first_unsure
            else:
                job_problems = []
                cfg, unsure = tolerant.compose(job_overrides, job_problems)
            # A job with a bad override is judged as far as it goes; in a multirun the other jobs show the rest.
            is_certain = not unsure and not (multirun and job_problems)
            job_problems += tolerant.unknown_keys(cfg, job_overrides) if runs and not job_problems else []
            run_dir = str(Path(str(cfg.hydra.run.dir)).absolute())
            with open_dict(cfg):
                del cfg["hydra"]
            fill_empty_groups(cfg)
            cfg.paths.run = run_dir
            if runs:
                job_problems += quick_problems(cfg) if is_certain else missing_and_unresolved(cfg)
            per_job.append(job_problems)
            jobs.append(Job(job_overrides, cfg))
    problems += [problem for problem in _over_jobs(per_job, lists) if problem not in problems]
    if problems:
        raise ConfigProblems(list(dict.fromkeys(problems)))
    return Plan(usable, jobs, multirun, not multirun or _is_grid(first), sweep_dir, first)


def check_plan(planned: Plan, note: Callable[[str], None] = lambda line: None) -> None:
    """Check the jobs of a plan against the code that they name; this imports torch and more.

    Args:
        planned: Composed plan.
        note: Function that is given a line for a person before the work that takes seconds.

    Raises:
        ConfigProblems: Everything that is wrong in any of the jobs.
    """
    note("loading PyTorch and checking the configuration ...")
    per_job = [code_problems(job.cfg) for job in planned.jobs]
    if problems := list(_over_jobs(per_job, [job.overrides for job in planned.jobs])):
        raise ConfigProblems(problems)


def _readable(overrides: Sequence[str], problems: list[str]) -> list[str]:
    """Return the overrides that can be read, numbers for alpha and beta written out."""
    usable: list[str] = []
    for override in overrides:
        try:
            parse(override)
            usable += expand_numbers([override])
        except UserError as error:
            problems.append(str(error))
    return usable


def _first_value(text: str) -> str:
    """Return an override with the first of its values."""
    override = parse(text)
    if not override.is_sweep_override():
        return text
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.start}"
    override.config_loader = parser().config_loader
    return f"{override.get_key_element()}={next(override.sweep_string_iterator(), 'null')}"


def _expand(overrides: Sequence[str], cfg: DictConfig, problems: list[str]) -> list[list[str]]:
    """Return the jobs of a multirun as Hydra's own sweeper makes them, or those at the ends of a search's ranges."""
    sweeper = cfg.hydra.sweeper
    own = [text for text in overrides if parse(text).is_hydra_override()]
    if sweeper.get("_target_") == search_space.SWEEPER_TARGET:
        if importlib.util.find_spec("optuna") is None:
            problems.append(str(missing_package("optuna")))
            return []
        search_problems, space = search_space.problems(cfg, overrides)
        problems += search_problems
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
    """Yield each problem of the jobs once; one that only some of them have names the first of these."""
    for problem in dict.fromkeys(itertools.chain.from_iterable(per_job)):
        having = [job for job, its_problems in zip(lists, per_job, strict=True) if problem in its_problems]
        if len(having) == len(lists):
            yield problem
        else:
            others = f" and {len(having) - 1} more" if len(having) > 1 else ""
            yield f"{problem} [job {' '.join(having[0])}{others}]"
