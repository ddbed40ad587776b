"""``spo verify``: each method trained on an enumerable language and compared with its optimum."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from spo.config.checks import check_config
from spo.config.checks.targets import CheckedParts, target_problems
from spo.config.compose import compose
from spo.config.groups import group_members
from spo.data.gold_columns import GOLD_COLUMNS
from spo.errors import UserError
from spo.exact import beyond_enumeration, why_no_optimum
from spo.losses import Loss
from spo.models import Reference
from spo.records.files import write_json
from spo.regularizers import GlobalKL
from spo.resources import conf_dir
from spo.stages.description import method_name
from spo.stages.quiet import quiet_libraries
from spo.stages.verify_case import SAMPLED_CHECKS, Case, Verdict, run_case
from spo.types import ListLogps

PLAN = "verify.yaml"
NUM_PROCESSES = 2
"""Processes that share the cases."""
MIN_CASES_OF_PROCESSES = 12
"""Number of cases below which starting processes costs more time than it saves."""


@dataclass(frozen=True)
class Member:
    """A method to verify.

    Attributes:
        key: Member of the config group ``method``.
        loss: Loss of the method.
        samples: Whether the method's own regularizer is the KL on samples of the policy.
    """

    key: str
    loss: Loss[Any]
    samples: bool


def verify_command(methods: Sequence[str], full: bool, config_dir: str | None, json_file: Path | None) -> bool:
    """Run all cases, print the table, and return whether all of them passed.

    Args:
        methods: Members of the config group ``method``; an empty list for all of them.
        full: Whether to train the whole grid of settings.
        config_dir: Folder with further members of the groups; its methods are verified as well.
        json_file: File for the rows, ``None`` for no file.

    Raises:
        UserError: A method cannot be composed, none can be verified, or the file cannot be written.
    """
    quiet_libraries()
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.absolute().parent}")
    plan = OmegaConf.load(conf_dir() / PLAN)
    assert isinstance(plan, DictConfig)
    cases, unverified = plan_cases(plan, full, config_dir, methods)
    console, verdicts = Console(), []
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("verifying", total=len(cases))
        for case, verdict in zip(cases, run_cases(cases, plan, config_dir), strict=True):
            progress.update(task, description=f"{case.member}, {case.model}")
            verdicts.append(verdict)
            progress.advance(task)
    if verdicts:
        console.print(_table(verdicts))
    if unverified:
        console.print(_table_without(unverified))
    if json_file is not None:
        write_json(json_file, [dataclasses.asdict(verdict) for verdict in verdicts])
    if not verdicts:
        raise UserError("nothing was verified, for the reasons above: name a method that compares log-probs alone")
    passed, failed = (sum(verdict.passed is outcome for verdict in verdicts) for outcome in (True, False))
    console.print(f"{passed} of {passed + failed} passed", style="red" if failed else "green")
    return failed == 0


def run_cases(cases: Sequence[Case], plan: DictConfig, config_dir: str | None) -> Iterator[Verdict]:
    """Yield the verdicts of cases in their order; many cases share two processes.

    Args:
        cases: Cases.
        plan: Settings of the command.
        config_dir: Folder with further members of the groups.
    """
    with tempfile.TemporaryDirectory(prefix="spo-verify-") as folder:
        cache = Path(folder) / "cache"
        arguments = [(case, plan, Path(folder) / str(n), cache, config_dir) for n, case in enumerate(cases)]
        if len(cases) < MIN_CASES_OF_PROCESSES or os.cpu_count() == 1:
            yield from (run_case(*given) for given in arguments)
            return
        # A process that is forked after torch has started threads may hang.
        pool = ProcessPoolExecutor(NUM_PROCESSES, get_context("spawn"), _start_process, (list(sys.path),))
        try:
            pending = [pool.submit(run_case, *given) for given in arguments]
            yield from (future.result() for future in pending)
        finally:
            pool.shutdown(cancel_futures=True)


def _start_process(path: list[str]) -> None:
    """Import from where the first process does, and leave the other cores to the other process."""
    sys.path[:] = path
    torch.set_num_threads(1)
    quiet_libraries()


def plan_cases(
    plan: DictConfig, full: bool, config_dir: str | None, methods: Sequence[str] = ()
) -> tuple[list[Case], dict[str, str]]:
    """Return the cases of the given methods, or of all methods, and the methods without an optimum with the reasons.

    Raises:
        UserError: The folder or a method does not exist.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir}: there is no such folder")
    known = group_members([conf_dir(), *([Path(config_dir)] if config_dir is not None else [])])["method"]
    if unknown := [method for method in methods if method not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise UserError(f"there is no method {unknown[0]}; {hint}")
    cases: list[Case] = []
    unverified: dict[str, str] = {}
    for key in methods or known:
        cfg = compose([f"method={key}"], config_dir=config_dir, run_dir=".")
        if (reason := _not_verifiable(cfg)) is not None:
            unverified[method_name(cfg)] = reason
            continue
        check_config(cfg)
        member = _member(key, cfg)
        if member.loss.no_optimum:
            steps = "" if key in plan.no_steps else "; its steps are verified"
            unverified[method_name(cfg)] = f"{member.loss.no_optimum}{steps}"
        # Without names, most methods have few cases, so that all of them take minutes.
        in_depth = bool(methods) or key in plan.in_depth
        found = _cases(plan, "brief" if not in_depth else "full" if full else "default", member)
        # What is sampled does not depend on the method, so the first method that samples stands for all.
        sampled = {case.check for case in cases} & {*SAMPLED_CHECKS}
        cases += [case for case in found if case.check not in sampled]
    return cases, unverified


def _not_verifiable(cfg: DictConfig) -> str | None:
    """Return why a method cannot be verified, ``None`` if it can or if its parts cannot be built."""
    # The columns and references that such a method reads are not there, and their absence is not a mistake here.
    parts = CheckedParts(cfg, [*target_problems(cfg)])
    loss, reference = parts.loss, parts.build("reference")
    if not isinstance(loss, Loss) or not isinstance(reference, Reference):
        return None
    return why_not_enumerable(loss, reference)


def why_not_verified(loss: Loss[Any], reference: Reference | type[Reference]) -> str | None:
    """Return why a loss cannot be compared with an optimum, ``None`` if it can.

    Args:
        loss: Loss of the method.
        reference: Reference of the method, or its class.
    """
    return why_not_enumerable(loss, reference) or why_no_optimum(loss, reference)


def why_not_enumerable(loss: Loss[Any], reference: Reference | type[Reference]) -> str | None:
    """Return why a loss cannot be computed from all responses of the enumerable language, ``None`` if it can."""
    missing = [
        column
        for feature in loss.features.values()
        if feature.default is None and feature.make is None
        for column in (feature.list_columns if loss.inputs is ListLogps else feature.columns)
        if column not in (*GOLD_COLUMNS, "rewards")
    ]
    if missing:
        return f"it reads the column {missing[0]}, which the enumerable language does not have"
    alone = None if loss.uses_rejected else "it learns from completions alone and compares none"
    return beyond_enumeration(loss, reference) or alone


def _member(key: str, cfg: DictConfig) -> Member:
    loss: Loss[Any] = instantiate(cfg.method.loss, _convert_="all")
    return Member(key, loss, isinstance(instantiate(cfg.regularizer, _convert_="all"), GlobalKL))


def _cases(plan: DictConfig, grid: str, member: Member) -> Iterator[Case]:
    loss = member.loss
    shared = [*plan.overrides, *(plan.lists if loss.inputs is ListLogps else []), f"method={member.key}"]
    for model, settings in plan.grids[grid].items():
        seen = []
        for setting in settings:
            check, kl = setting.get("check", "optimum"), setting.get("kl", False)
            if (kl is True and loss.uses_beta) or (check in ("sampled", "sampler") and not member.samples):
                continue
            if (check == "optimum" and loss.no_optimum) or (check == "steps" and member.key in plan.no_steps):
                continue
            alpha = float(setting.alpha) if loss.uses_alpha else None
            beta = float(setting.beta) if loss.uses_beta or kl else None
            if (check, alpha, beta) in seen:
                continue
            seen.append((check, alpha, beta))
            own = plan.methods.get(member.key, {}).get(model, [])
            chosen = [f"model={model}", *plan.models[model], *own]
            chosen.append(f"regularizer={_regularizer(check, bool(kl))}")
            chosen += plan.checks[check]
            weight: float | str = float(kl) if loss.uses_beta else "beta"
            chosen += [f"regularizer.weight={weight}"] if kl else []
            chosen += [f"{key}={value}" for key, value in (("alpha", alpha), ("beta", beta)) if value is not None]
            kl_weight = float(setting.beta if weight == "beta" else weight) if kl else 0.0
            yield Case(member.key, str(model), check, alpha, beta, kl_weight, (*shared, *chosen))


def _regularizer(check: str, kl: bool) -> str:
    if check in SAMPLED_CHECKS:
        return "global_kl"
    return "enumerated_kl" if kl else "none"


def _table(verdicts: Sequence[Verdict]) -> Table:
    title = "trained policies against what the papers predict"
    # Without edges the shipped methods fit 80 columns. Longer names are folded, so that no verdict is cut.
    table = Table(title=title, caption=CAPTION, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    texts = ("method", "model", "check", "")
    for name in ("method", "model", "check", "alpha", "beta", "error", "entropy", "predicted", ""):
        table.add_column(name, justify="left" if name in texts else "right", no_wrap=name != "method", overflow="fold")
    for verdict in verdicts:
        reached, predicted = (
            "" if number is None else f"{number:.4f}" for number in (verdict.entropy, verdict.entropy_predicted)
        )
        table.add_row(
            verdict.method,
            verdict.model,
            verdict.check,
            *("" if number is None else f"{number:g}" for number in (verdict.alpha, verdict.beta)),
            _error(verdict),
            reached,
            predicted + ("*" if verdict.optimum == "numerical" else " "),
            {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "open"}[verdict.passed],
        )
    return table


def _table_without(reasons: Mapping[str, str]) -> Table:
    table = Table(title="methods without a known optimum", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("method", overflow="fold")
    table.add_column("why", overflow="fold")
    for method, reason in reasons.items():
        table.add_row(method, reason)
    return table


def _error(verdict: Verdict) -> str:
    if verdict.deviation is not None:
        return f"{verdict.deviation:.1f} sd"
    return "none" if verdict.tv is None else f"{verdict.tv:.0e}"


CAPTION = (
    "error: total variation to the optimum (* no closed form), after steps to the policy that gradient descent on the "
    "paper's objective reaches, and standard deviations from the expectation of what is sampled. Entropies in nats per "
    "response. For methods that do not read beta it is the weight of the KL. open: no single minimum was found."
)
