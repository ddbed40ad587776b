"""``spo verify``: each method trained on an enumerable language and compared with its optimum."""

from __future__ import annotations

import dataclasses
import difflib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from spo.errors import UserError
from spo.exact import beyond_enumeration
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
        full: Whether to train the whole grid instead of two settings per method.
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
    cases, skipped = plan_cases(plan, full, config_dir, methods)
    console, verdicts = Console(), []
    with (
        tempfile.TemporaryDirectory(prefix="spo-verify-") as folder,
        Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress,
    ):
        task = progress.add_task("verifying", total=len(cases))
        for number, case in enumerate(cases):
            progress.update(task, description=f"{case.member}, {case.model}")
            verdicts.append(run_case(case, plan, Path(folder) / str(number), Path(folder) / "cache", config_dir))
            progress.advance(task)
    if verdicts:
        console.print(_table(verdicts))
    for line in skipped:
        console.print(line, highlight=False)
    if json_file is not None:
        write_json(json_file, [dataclasses.asdict(verdict) for verdict in verdicts])
    if not verdicts:
        raise UserError("nothing was verified, for the reasons above: name a method that compares log-probs alone")
    failed = sum(not verdict.passed for verdict in verdicts)
    console.print(f"{len(verdicts) - failed} of {len(verdicts)} passed", style="red" if failed else "green")
    return failed == 0


def plan_cases(
    plan: DictConfig, full: bool, config_dir: str | None, methods: Sequence[str] = ()
) -> tuple[list[Case], list[str]]:
    """Return the cases of the given methods, or of all methods, and a sentence for each method that is skipped.

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
    skipped: list[str] = []
    for key in methods or known:
        cfg = compose([f"method={key}"], config_dir=config_dir, run_dir=".")
        if (reason := _not_verifiable(cfg)) is not None:
            skipped.append(f"{method_name(cfg)} is skipped: {reason}")
            continue
        check_config(cfg)
        found = _cases(plan, "full" if full else "default", _member(key, cfg))
        # What is sampled does not depend on the method, so the first method that samples stands for all.
        sampled = {case.check for case in cases} & {*SAMPLED_CHECKS}
        cases += [case for case in found if case.check not in sampled]
    return cases, skipped


def _not_verifiable(cfg: DictConfig) -> str | None:
    """Return why a method cannot be verified, ``None`` if it can or if its parts cannot be built."""
    # The columns and references that such a method reads are not there, and their absence is not a mistake here.
    parts = CheckedParts(cfg, [*target_problems(cfg)])
    loss, reference = parts.loss, parts.build("reference")
    if not isinstance(loss, Loss) or not isinstance(reference, Reference):
        return None
    return why_not_verified(loss, reference)


def why_not_verified(loss: Loss[Any], reference: Reference | type[Reference]) -> str | None:
    """Return why a loss cannot be compared with an optimum, ``None`` if it can.

    Args:
        loss: Loss of the method.
        reference: Reference of the method, or its class.
    """
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
            alpha = float(setting.alpha) if loss.uses_alpha else None
            beta = float(setting.beta) if loss.uses_beta or kl else None
            if (check, alpha, beta) in seen:
                continue
            seen.append((check, alpha, beta))
            chosen = [f"model={model}", *plan.models[model]]
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
            "[green]pass[/]" if verdict.passed else "[red]FAIL[/]",
        )
    return table


def _error(verdict: Verdict) -> str:
    if verdict.deviation is not None:
        return f"{verdict.deviation:.1f} sd"
    return "none" if verdict.tv is None else f"{verdict.tv:.0e}"


CAPTION = (
    "error: total variation to the optimum (* no closed form), after steps to the policy that gradient descent on the "
    "paper's objective reaches, and standard deviations from the expectation of what is sampled. Entropies in nats per "
    "response. For methods that do not read beta it is the weight of the KL."
)
