"""The commands of ``spo``: the arguments of each, and the stage that it starts.

A command imports its stage itself, so that no command waits for what another one needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.help import COMMANDS

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from spo.stages.sample_request import SampleRequest, TrustedOverrides


Job = Callable[["DictConfig"], Any]
"""Function of the configuration of a job."""


class UsageError(Exception):
    """A command line that does not fit its usage."""


class Parser(argparse.ArgumentParser):
    """Parser of a command, which raises its errors."""

    def __init__(self, usage: str) -> None:
        super().__init__(prog="spo", usage=usage, add_help=False, allow_abbrev=False)

    def add_trust(self) -> None:
        """Add the flags by which a person allows what the configuration of a run directory asks for."""
        self.add_argument("--allow", action="append", default=[], metavar="NAME")
        self.add_argument("--config-dir", "-cd", metavar="DIR")

    def error(self, message: str) -> Any:
        # Options may stand between overrides, so argparse counts overrides as missing, although they are optional.
        raise UsageError(f"{message.removesuffix(', overrides')}\nusage: {self.usage}")


# --- spo train -----------------------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    if "--resume" in arguments or any(word.startswith("--resume=") for word in arguments):
        return _resume(arguments)
    return _launch("train", arguments, arguments, _job, _checked_job)


def _iterate(arguments: list[str]) -> int:
    from spo.config.iterations import iteration_arguments

    return _launch("iterate", arguments, iteration_arguments(arguments), _iteration_job, _iteration_job)


def _launch(command: str, typed: list[str], arguments: list[str], job: Job, checked_job: Job) -> int:
    """Run the jobs of a command line with Hydra's grammar.

    Args:
        command: Name of the command.
        typed: Arguments as typed.
        arguments: Arguments with what the command adds to them.
        job: Function of the configuration of a job.
        checked_job: The same function for a configuration that this process has checked.

    Returns:
        Exit status.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = f"spo {command}"
    flags = parser.parse_intermixed_args(arguments)
    hydra_flags = _without(arguments, flags.overrides)

    if flags.hydra_help or flags.info is not None or flags.shell_completion:
        from spo.runs.launch import run_hydra

        run_hydra(arguments, job)
        return 0
    from spo.config.compose import pinned_overrides
    from spo.config.plan import check_plan, compose_plan

    planned = compose_plan(
        flags.overrides, multirun=flags.multirun, config_dir=flags.config_dir, runs=flags.cfg is None
    )
    if flags.cfg is not None:  # Of several jobs the first is shown.
        from spo.runs.launch import run_hydra

        single = [word for word in hydra_flags if word not in ("-m", "--multirun")]
        run_hydra([*single, *planned.jobs[0].overrides, *pinned_overrides(planned.jobs[0].cfg)], job)
        return 0
    from spo.config.iterations import check_command_fits

    check_command_fits(command, [one.cfg for one in planned.jobs])
    if not planned.multirun:
        from spo.stages.start import start_run

        return start_run(command, typed, planned, checked_job, _note)
    from spo.processes import place

    if (own := place()).world_size > 1:
        raise UsageError(
            f"-m: {own.launcher} has started {own.world_size} processes, and a multirun starts those of its runs "
            "itself: call it once, with trainer.devices=N, or with launcher=slurm"
        )
    check_plan(planned, _note)
    from spo.config.checks import warnings
    from spo.errors import SET_SWEEP, placed_by
    from spo.runs.launch import launch_sweep

    for warning in dict.fromkeys(text for one in planned.jobs for text in warnings(one.cfg)):
        print(f"note: {warning}", file=sys.stderr)
    with placed_by(SET_SWEEP, planned.sweep_dir):
        return 0 if launch_sweep(hydra_flags, planned, job, flags.config_dir, command) else 1


def _note(line: str) -> None:
    print(f"spo: {line}", file=sys.stderr)


def _without(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return the flags of a command line; Hydra's parser cannot read flags and overrides in any order."""
    left, flags = list(overrides), []
    for word in arguments:
        if left and word == left[0]:
            left.pop(0)
        else:
            flags.append(word)
    return flags


def _job(cfg: DictConfig) -> Any:
    """Train in a process of a multirun; a module-level function, so that launchers can pickle it."""
    from spo.stages.train import train

    return train(cfg)


def _checked_job(cfg: DictConfig) -> Any:
    """Train with a configuration that this process has checked."""
    from spo.stages.train import train

    return train(cfg, checked=True)


def _iteration_job(cfg: DictConfig) -> Any:
    """Train an iteration; a module-level function, so that launchers can pickle it."""
    from spo.stages.iterate import iterate

    return iterate(cfg)


def _resume(arguments: list[str]) -> int:
    parser = Parser("spo train --resume RUN_DIR [trainer.max_steps=N] [logger.KEY=VALUE] [strategy=MEMBER] ...")
    parser.add_argument("--resume", metavar="RUN_DIR", type=Path, required=True)
    parser.add_trust()
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    from spo.errors import COPY_RUN, placed_by
    from spo.stages.start import start_resume

    with placed_by(COPY_RUN, given.resume):
        return start_resume(arguments, given.resume, given.overrides, given.allow, given.config_dir)


# --- the other commands --------------------------------------------------------------------------------------------


def _evaluate(arguments: list[str]) -> int:
    parser = Parser(COMMANDS["evaluate"].usage)
    parser.add_argument("run_dir", type=Path)
    parser.add_trust()
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    from spo.stages.start import start_evaluation

    return start_evaluation(arguments, given.run_dir, given.overrides, given.allow, given.config_dir)


def _extrapolate(arguments: list[str]) -> int:
    parser = Parser(COMMANDS["extrapolate"].usage)
    parser.add_argument("first", metavar="SFT")
    parser.add_argument("second", metavar="ALIGNED")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--factor", type=float, metavar="NUMBER")
    how.add_argument("--search", action="store_true")
    parser.add_argument("--select", metavar="KEY")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True)
    parser.add_trust()
    parser.add_argument("overrides", nargs="*")
    given = vars(parser.parse_intermixed_args(arguments))
    if not given.pop("search") and given["select"] is not None:
        raise UsageError(f"--select chooses the score of --search\nusage: {parser.usage}")
    from spo.stages.extrapolation_plan import plan_extrapolation, start_processes

    if (status := start_processes(arguments, given["overrides"])) is not None:
        return status
    plan = plan_extrapolation(**given)
    from spo.stages.extrapolate import extrapolate_command

    extrapolate_command(plan)
    return 0


def _compare(arguments: list[str]) -> int:
    parser = Parser(COMMANDS["compare"].usage)
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--by", metavar="KEY[,KEY...]", default=())
    for name in ("--metric", "--select", "--baseline"):
        parser.add_argument(name)
    parser.add_argument("--anyway", action="store_true")
    given = parser.parse_intermixed_args(arguments)
    from spo.stages.compare import compare_command

    compare_command(**vars(given))
    return 0


def _sample(arguments: list[str]) -> int:
    request, trusted, as_json = _sampling("sample", arguments)
    from spo.stages.sample import sample_command

    sample_command(request, trusted, as_json=as_json)
    return 0


def _chat(arguments: list[str]) -> int:
    request, trusted, _ = _sampling("chat", arguments)
    from spo.stages.chat import chat_command

    chat_command(request, trusted)
    return 0


def _sampling(name: str, arguments: list[str]) -> tuple[SampleRequest, TrustedOverrides, bool]:
    """Return settings, overrides and ``--json`` of a command that samples, checked before torch is imported."""
    from spo.stages.sample_request import STANDARD_INPUT, SampleRequest, TrustedOverrides, let_input_hold_any_bytes

    parser = Parser(COMMANDS[name].usage)
    parser.add_argument("model", metavar="RUN", type=Path)
    if name == "sample":
        parser.add_argument("prompt", metavar="PROMPT")
        parser.add_argument("-n", dest="count", type=int, default=4)
        parser.add_argument("--json", action="store_true")
        parser.add_argument("--principle", metavar="TEXT")
        parser.add_argument("--ratio", type=float)
        parser.add_argument("--nucleus", choices=("principled", "contrast"))
        parser.add_argument("--best-of", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--against", metavar="reference|RUN|FOLDER")
    parser.add_argument("--plain", action="store_true")
    parser.add_trust()
    parser.add_argument("overrides", nargs="*")
    given = vars(parser.parse_intermixed_args(arguments))
    trusted = TrustedOverrides(given.pop("overrides"), given.pop("allow"), given.pop("config_dir"))
    as_json = given.pop("json", False)
    if given.get("prompt") == STANDARD_INPUT:
        let_input_hold_any_bytes()
        given["prompt"] = sys.stdin.read().removesuffix("\n")
    request = SampleRequest(**given)
    judges = [word for word in trusted.overrides if word.startswith(("judge=", "judge."))]
    problem = request.problem(needs_prompt=name == "sample")
    if problem is None and judges and request.best_of is None:
        problem = f"{judges[0]}: a judge chooses among several completions: add --best-of N"
    if problem is not None:
        raise UsageError(f"{problem}\nusage: {parser.usage}")
    request.check_models()
    return request, trusted, as_json


def _report(arguments: list[str]) -> int:
    parser = Parser(COMMANDS["report"].usage)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--spec", metavar="NAME|FILE")
    given = parser.parse_args(arguments)
    from spo.errors import COPY_RUN, UserError, placed_by
    from spo.pages.dashboard import load_spec
    from spo.pages.run_page import render_report
    from spo.records.iteration import is_iteration
    from spo.records.run import NotARunError

    with placed_by(COPY_RUN, given.run_dir):
        if is_iteration(given.run_dir):
            from spo.pages.iteration_page import render_iteration

            if given.spec is not None:
                raise UserError(f"--spec: the page of an iteration ({given.run_dir}) has fixed figures; leave it out")
            print(render_iteration(given.run_dir))
            return 0
        try:
            print(render_report(given.run_dir, load_spec(given.spec)))
        except NotARunError as error:
            raise UserError(str(error)) from error
    return 0


def _dashboard(arguments: list[str]) -> int:
    parser = Parser(COMMANDS["dashboard"].usage)
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="*", type=Path)
    parser.add_argument("--spec", metavar="NAME|FILE")
    parser.add_argument("--group-by", metavar="KEY")
    parser.add_argument("--method", metavar="NAME[,NAME]", default="")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_intermixed_args(arguments)
    entity, _, project = given.project.partition("/")
    if not (entity and project) or "/" in project:
        raise UsageError(f"{given.project}: give the entity and the project as ENTITY/PROJECT\nusage: {parser.usage}")
    from spo.errors import UserError
    from spo.pages.dashboard import load_spec
    from spo.records.run import NotARunError, read_run

    dashboard = load_spec(given.spec)
    for run_dir in given.run_dirs:
        try:
            dashboard = dashboard.with_metrics_of(read_run(run_dir))
        except NotARunError as error:
            raise UserError(str(error)) from error
    from spo.tracking import workspace

    methods = [name for name in given.method.split(",") if name]
    make = workspace.report if given.report else workspace.workspace
    print(workspace.save(make(dashboard, entity, project, given.group_by, methods)))
    if apart := workspace.left_out(dashboard, methods, report=given.report):
        advice = "--method NAME,NAME" if given.report else "--method NAME, for a workspace of one method"
        words = f"Left out, since methods do not share a scale: {', '.join(apart)}. To see them, add {advice}."
        print(words, file=sys.stderr)
    return 0


def _inspect(arguments: list[str]) -> int:
    parser = Parser(COMMANDS["inspect"].usage)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--limit", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--config-dir", "-cd", metavar="DIR")
    given = parser.parse_intermixed_args(arguments)
    from spo.config.plan import check_plan, compose_plan

    planned = compose_plan(given.overrides, config_dir=given.config_dir)
    check_plan(planned, _note)
    from spo.stages.inspect import inspect

    inspect(planned.jobs[0].cfg, given.limit, given.json)
    return 0


def _methods(arguments: list[str]) -> int:
    from spo.pages.methods import DATA_KINDS

    parser = Parser(COMMANDS["methods"].usage)
    parser.add_argument("name", metavar="NAME", nargs="?")
    parser.add_argument("--data", choices=DATA_KINDS)
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--json", dest="json_file", type=Path, metavar="FILE")
    parser.add_argument("--config-dir", "-cd", metavar="DIR")
    given = parser.parse_intermixed_args(arguments)
    if given.name is not None and (given.data is not None or given.no_reference):
        raise UsageError(f"name a method, or filter the table with --data and --no-reference\nusage: {parser.usage}")
    from spo.stages.methods import methods_command

    methods_command(**vars(given))
    return 0


def _verify(arguments: list[str]) -> int:
    parser = Parser(COMMANDS["verify"].usage)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--config-dir", "-cd", metavar="DIR")
    given = parser.parse_intermixed_args(arguments)
    from spo.stages.verify import verify_command

    return 0 if verify_command(given.methods, given.full, given.config_dir, given.json) else 1


def _clean(arguments: list[str]) -> int:
    parser = Parser(COMMANDS["clean"].usage)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--delete", action="store_true")
    parser.add_argument("--older-than", type=float, default=0.0, metavar="DAYS")
    given = parser.parse_intermixed_args(arguments)
    from spo.stages.clean import clean_command

    clean_command(given.overrides, delete=given.delete, older_than=given.older_than)
    return 0


RUN: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "iterate": _iterate,
    "evaluate": _evaluate,
    "extrapolate": _extrapolate,
    "compare": _compare,
    "sample": _sample,
    "chat": _chat,
    "report": _report,
    "dashboard": _dashboard,
    "inspect": _inspect,
    "methods": _methods,
    "verify": _verify,
    "clean": _clean,
}
