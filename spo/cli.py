"""The command line ``spo COMMAND ...``: arguments, help and dispatch. Each command imports what it needs itself."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo.config.groups import group_members
from spo.resources import conf_dir

if TYPE_CHECKING:
    from omegaconf import DictConfig


class UsageError(Exception):
    """A command line that does not fit its usage."""


# --- help ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: Its line in the list of commands.
        usage: How it is called.
        text: Its help.
        examples: Command lines to copy.
        run: Function from its arguments to the exit status.
        groups: Whether it takes config groups.
    """

    summary: str
    usage: str
    text: str
    examples: Sequence[str]
    run: Callable[[list[str]], int]
    groups: bool = False


def _help(name: str | None, arguments: Sequence[str]) -> str:
    """Return the help of a command, ``None`` for that of all of them."""
    if name is None:
        width = max(map(len, COMMANDS))
        lines = [
            "usage: spo COMMAND ...",
            "",
            "Aligns language models to preferences, with SPO and other methods, on one footing.",
            "",
            "commands:",
            *(f"  {key:{width}}  {command.summary}" for key, command in COMMANDS.items()),
            "",
            *_groups_help(arguments),
            "examples:",
            *(f"  {command.examples[0]}" for command in COMMANDS.values()),
            "",
            "spo COMMAND --help explains each.",
        ]
        return "\n".join(lines)
    command = COMMANDS[name]
    lines = [f"usage: {command.usage}", "", textwrap.dedent(command.text).strip(), ""]
    if command.groups:
        lines += _groups_help(arguments)
    return "\n".join([*lines, "examples:", *(f"  {example}" for example in command.examples)])


def _groups_help(arguments: Sequence[str]) -> list[str]:
    groups = group_members(_config_folders(arguments))
    width = max(map(len, groups), default=0)
    lines = ["config groups, chosen as GROUP=MEMBER (debug: +debug=MEMBER); any key as GROUP.KEY=VALUE:"]
    for group, members in groups.items():
        lines += textwrap.wrap(
            ", ".join(members),
            100,
            initial_indent=f"  {group:{width}}  ",
            subsequent_indent=" " * (width + 4),
        )
    return [*lines, ""]


def _config_folders(arguments: Sequence[str]) -> list[Path]:
    config_dir = _option(arguments, "--config-dir", "-cd")
    return [conf_dir(), *([Path(config_dir)] if config_dir is not None else [])]


def _option(arguments: Sequence[str], *names: str) -> str | None:
    """Return the value of an option, ``None`` if it is not given."""
    for position, word in enumerate(arguments):
        if word in names:
            return arguments[position + 1] if position + 1 < len(arguments) else None
        if word.partition("=")[0] in names and "=" in word:
            return word.partition("=")[2]
    return None


# --- spo train -----------------------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    if "--resume" in arguments or any(word.startswith("--resume=") for word in arguments):
        return _resume(arguments)
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = "spo train"
    flags = parser.parse_intermixed_args(arguments)
    hydra_flags = _without(arguments, flags.overrides)

    if flags.hydra_help or flags.info is not None or flags.shell_completion:
        from spo.runs.launch import run_hydra

        run_hydra(arguments, _job)
        return 0
    from spo.config.plan import check_plan, compose_plan

    planned = compose_plan(
        flags.overrides, multirun=flags.multirun, config_dir=flags.config_dir, runs=flags.cfg is None
    )
    if flags.cfg is None and not planned.multirun:
        from spo.runs.another_run import refuse_another_run

        refuse_another_run(Path(planned.jobs[0].cfg.paths.run), planned.jobs[0].cfg)
    from spo.runs.launch import launch_run, launch_sweep, run_hydra
    from spo.runs.processes import is_first_process

    if flags.cfg is not None:  # Of several jobs the first is shown.
        single = [word for word in hydra_flags if word not in ("-m", "--multirun")]
        run_hydra([*single, *planned.jobs[0].overrides], _job)
        return 0
    check_plan(planned, _note if is_first_process() else lambda line: None)
    if not planned.multirun:
        launch_run(planned, _checked_job)
        return 0
    if not is_first_process():
        run_hydra([*hydra_flags, *planned.overrides], _job)
        return 0
    from spo.config.checks import warnings

    for warning in dict.fromkeys(text for job in planned.jobs for text in warnings(job.cfg)):
        print(f"note: {warning}", file=sys.stderr)
    return 0 if launch_sweep(hydra_flags, planned, _job, flags.config_dir) else 1


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


def _resume(arguments: list[str]) -> int:
    parser = _Parser("spo train --resume RUN_DIR [trainer.max_steps=N] [logger.KEY=VALUE] [strategy=MEMBER] ...")
    parser.add_argument("--resume", metavar="RUN_DIR", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    from spo.stages.train import resume

    resume(given.resume, given.overrides)
    return 0


# --- the other commands --------------------------------------------------------------------------------------------


def _evaluate(arguments: list[str]) -> int:
    parser = _Parser(COMMANDS["evaluate"].usage)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    from spo.stages.evaluate import evaluate_command

    evaluate_command(given.run_dir, given.overrides)
    return 0


def _compare(arguments: list[str]) -> int:
    parser = _Parser(COMMANDS["compare"].usage)
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, metavar="DIR")
    for name in ("--metric", "--select", "--baseline"):
        parser.add_argument(name)
    parser.add_argument("--anyway", action="store_true")
    given = parser.parse_intermixed_args(arguments)
    from spo.stages.compare import compare_command

    compare_command(**vars(given))
    return 0


def _report(arguments: list[str]) -> int:
    parser = _Parser(COMMANDS["report"].usage)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--spec", metavar="NAME|FILE")
    given = parser.parse_args(arguments)
    from spo.errors import UserError
    from spo.pages.dashboard import load_spec
    from spo.pages.run_page import render_report

    try:
        print(render_report(given.run_dir, load_spec(given.spec)))
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    return 0


def _dashboard(arguments: list[str]) -> int:
    parser = _Parser(COMMANDS["dashboard"].usage)
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("--spec", metavar="NAME|FILE")
    parser.add_argument("--group-by", metavar="KEY")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args(arguments)
    entity, _, project = given.project.partition("/")
    if not (entity and project) or "/" in project:
        raise UsageError(f"{given.project}: give the entity and the project as ENTITY/PROJECT\nusage: {parser.usage}")
    from spo.pages.dashboard import load_spec

    dashboard = load_spec(given.spec)
    from spo.tracking import workspace

    make = workspace.report if given.report else workspace.workspace
    print(workspace.save(make(dashboard, entity, project, given.group_by)))
    return 0


def _inspect(arguments: list[str]) -> int:
    parser = _Parser(COMMANDS["inspect"].usage)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--limit", type=int, default=3, metavar="N")
    parser.add_argument("--config-dir", "-cd", metavar="DIR")
    given = parser.parse_intermixed_args(arguments)
    from spo.config.plan import check_plan, compose_plan

    planned = compose_plan(given.overrides, config_dir=given.config_dir)
    check_plan(planned, _note)
    from spo.stages.train import inspect

    inspect(planned.jobs[0].cfg, given.limit)
    return 0


def _verify(arguments: list[str]) -> int:
    parser = _Parser(COMMANDS["verify"].usage)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--config-dir", "-cd", metavar="DIR")
    given = parser.parse_intermixed_args(arguments)
    from spo.stages.verify import verify_command

    return 0 if verify_command(given.methods, given.full, given.config_dir, given.json) else 1


class _Parser(argparse.ArgumentParser):
    def __init__(self, usage: str) -> None:
        super().__init__(prog="spo", usage=usage, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}\nusage: {self.usage}")


COMMANDS = {
    "train": Command(
        "align a model and evaluate it",
        "spo train [GROUP=MEMBER] [KEY=VALUE] ... [-m] [--cfg job] [--config-dir DIR]\n"
        "       spo train --resume RUN_DIR [trainer.max_steps=N] [logger.KEY=VALUE] [strategy=MEMBER] ...",
        """
        Makes or loads the reference model, aligns it with a method, and evaluates the result on held-out prompts.
        The run directory gets the model, the metrics, the samples and report.html. Without arguments it uses a
        built-in model and data set, and runs on any computer without a network.

        -m, --multirun    one run for each combination of values: method=spo,dpo seed=1,2
        --cfg job         print the configuration instead of running it (--resolve fills in references)
        --config-dir DIR  a folder with your own members of the groups below
        --resume RUN_DIR  resume an interrupted run, or train for more steps; an unfinished run also takes another
                          judge=MEMBER or evaluation.KEY=VALUE
        --hydra-help      Hydra's own flags, all of which work

        Plain numbers work for alpha and beta: alpha=0.5 is alpha=constant alpha.value=0.5.
        """,
        [
            "spo train",
            "spo train model=hf model.path=MODEL data=jsonl data.path=PAIRS.jsonl",
            "spo train method=dpo beta=0.1 seed=1",
            "spo train -m method=spo,dpo,ipo seed=1,2",
            "spo train --resume outputs/runs/RUN trainer.max_steps=300",
        ],
        _train,
        groups=True,
    ),
    "evaluate": Command(
        "evaluate the policy of a run again",
        "spo evaluate RUN_DIR [KEY=VALUE] ...",
        "Samples completions of test prompts from the policy and its reference, and compares them with other settings or
        data.",
        [
            "spo evaluate outputs/runs/RUN evaluation.num_prompts=512",
            "spo evaluate outputs/runs/RUN data=jsonl data.path=PAIRS.jsonl",
        ],
        _evaluate,
    ),
    "compare": Command(
        "compare the methods of a sweep",
        "spo compare SWEEP_OR_RUN ... [--out DIR] [--metric KEY] [--select KEY] [--baseline METHOD] [--anyway]",
        """
        Reads run directories, finds the best setting of each method on the selection split, and compares those on the
        test split. Writes a table with intervals over seeds and prompts, the differences that are significant, and a page
        with figures. Refuses an unfair comparison: unequal numbers of settings, missing seeds, mixed data, unfinished runs.

        --out DIR          folder of the results; by default comparison/ beside the runs
        --metric KEY       the key of metrics.json that ranks methods; by default eval/win_rate
        --select KEY       the key that selects settings; by default val/win_rate, or what the runs have instead
        --baseline METHOD  compare each method with this one, instead of each with each
        --anyway           compare although it is unfair, and mark this in every output
        """,
        ["spo compare outputs/sweeps/baselines", "spo compare outputs/sweeps/baselines --baseline dpo --out results"],
        _compare,
    ),
    "report": Command(
        "write report.html of a run again",
        "spo report RUN_DIR [--spec NAME|FILE]",
        """
        Writes the page from the files of the run directory; the run need not be finished.

        --spec NAME|FILE  the curves to draw: a dashboard of conf/dashboard, or your own yaml file
        """,
        ["spo report outputs/runs/RUN", "spo report outputs/runs/RUN --spec my_dashboard.yaml"],
        _report,
    ),
    "dashboard": Command(
        "make a W&B workspace or report for the runs of a project",
        "spo dashboard ENTITY/PROJECT [--report] [--group-by KEY] [--spec NAME|FILE]",
        """
        Saves a dashboard as a new view of a W&B project: a workspace, or a report to edit and share. It needs an API key
        and pip install 'spo[dashboards]'. spo report draws the same dashboard without W&B.

        --report          a report instead of a workspace
        --group-by KEY    one line, a mean with a band, for each value of a configuration key
        --spec NAME|FILE  a dashboard of conf/dashboard, or your own yaml file
        """,
        ["spo dashboard ENTITY/spo", "spo dashboard ENTITY/spo --report --group-by method.name"],
        _dashboard,
    ),
    "inspect": Command(
        "show the rows of a data set as tokens, masks and text",
        "spo inspect [data=MEMBER] [model=MEMBER] [KEY=VALUE] ... [--limit N] [--config-dir DIR]",
        "Prints pairs exactly as the model sees them in training, and counts the used, dropped and truncated ones.",
        ["spo inspect data=jsonl data.path=PAIRS.jsonl model=hf model.path=MODEL"],
        _inspect,
        groups=True,
    ),
    "verify": Command(
        "train every method to the optimum its paper proves",
        "spo verify [METHOD ...] [--full] [--json FILE] [--config-dir DIR]",
        """
        Trains every method of the config group on a language small enough to enumerate, as a table of logits and as a
        transformer. Compares each policy with the optimum of its objective: in closed form if the method states one,
        solved numerically otherwise. Ends with status 1 if a policy misses its optimum.

        METHOD ...        only these methods; by default all of them
        --full            the whole grid of alpha and beta instead of two settings per method
        --json FILE       also write the rows of the table as JSON
        --config-dir DIR  a folder with your own methods (DIR/method/NAME.yaml), which are verified too
        """,
        ["spo verify", "spo verify --config-dir my_conf --json verified.json"],
        _verify,
    ),
}


# --- entry ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after ``spo``; ``None`` for those of the process.

    Returns:
        Exit status: 0, 1 for an error in the run or its settings, 2 for a wrong command line, 130 for an interruption.
    """
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # The reader stopped reading, as in `spo --help | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(words: list[str]) -> int:
    name, arguments = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(_help(None, arguments))
        return 0
    if name in ("--version", "-V"):
        from spo import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f": the commands are {', '.join(COMMANDS)}"
        return _fail(f"there is no command {name!r}{hint}", 2)
    if "--help" in arguments or "-h" in arguments:
        print(_help(name, arguments))
        return 0
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # As `python -m` does, since a `_target_` may lie in the current folder.
    try:
        return COMMANDS[name].run(arguments)
    except UsageError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get("SPO_DEBUG") == "1":
            raise
        from spo.errors import user_message

        words_of_error = user_message(error)
        if words_of_error is None:
            raise
        return _fail(words_of_error, 1)


def _fail(message: str, status: int) -> int:
    sys.stdout.flush()
    print(f"spo: {message}", file=sys.stderr)
    return status
