"""``spo verify``: each method trained on an enumerable language and compared with its optimum."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from spo.config.checks import check_config
from spo.config.compose import compose
from spo.config.groups import group_members
from spo.errors import UserError
from spo.guard import NonFiniteError
from spo.losses import Loss
from spo.records.files import write_json
from spo.resources import conf_dir
from spo.stages.assemble import assemble
from spo.stages.description import method_name
from spo.stages.from_config import resolve_values
from spo.stages.prepare import prepare_run
from spo.stages.quiet import quiet_libraries

PLAN = "verify.yaml"


@dataclass(frozen=True)
class Case:
    """One training: a method with one pair of coefficients on one model.

    Attributes:
        member: Member of the config group ``method``.
        model: Member of the config group ``model``.
        alpha: Softness, ``None`` if the method does not read it.
        beta: Temperature of the method or weight of the KL, ``None`` if nothing reads it.
        overrides: All overrides that compose the configuration.
    """

    member: str
    model: str
    alpha: float | None
    beta: float | None
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """Result of a training.

    Attributes:
        method: Name of the method.
        model: ``tabular`` or ``tiny``.
        alpha: Softness, or ``None``.
        beta: Temperature of the method or weight of the KL, or ``None``.
        tv: Total variation to the optimum, mean over prompts; ``None`` if it is not finite or there is no optimum.
        entropy: Entropy of the trained policy, nats per response.
        entropy_predicted: Entropy of the optimum, nats per response.
        optimum: ``closed form``, ``numerical`` or ``none``.
        passed: Whether ``tv`` is within the tolerance of the model.
    """

    method: str
    model: str
    alpha: float | None
    beta: float | None
    tv: float | None
    entropy: float | None
    entropy_predicted: float | None
    optimum: str
    passed: bool


def verify_command(methods: Sequence[str], full: bool, config_dir: str | None, json_file: Path | None) -> bool:
    """Run all cases, print the table, and return whether all of them passed.

    Args:
        methods: Members of the config group ``method``; an empty list for all of them.
        full: Whether to train the whole grid instead of two settings per method.
        config_dir: Folder with further members of the groups; its methods are verified as well.
        json_file: File for the rows, ``None`` for no file.

    Raises:
        UserError: A method cannot be composed, or the file cannot be written.
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
            verdicts.append(run_case(case, Path(folder), number, plan.tolerance[case.model], config_dir))
            progress.advance(task)
    console.print(_table(verdicts))
    for line in skipped:
        console.print(line, highlight=False)
    if json_file is not None:
        write_json(json_file, [dataclasses.asdict(verdict) for verdict in verdicts])
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
    for member in methods or known:
        loss, name = _instantiate_loss(member, config_dir)
        if not loss.uses_rejected:
            skipped.append(f"{name} is skipped: it learns from completions alone and compares none")
            continue
        cases += _cases(plan, "full" if full else "default", member, loss)
    return cases, skipped


def _instantiate_loss(member: str, config_dir: str | None) -> tuple[Loss[Any], str]:
    cfg = compose([f"method={member}"], config_dir=config_dir, run_dir=".")
    check_config(cfg)
    return instantiate(cfg.method.loss, _convert_="all"), method_name(cfg)


def _cases(plan: DictConfig, grid: str, member: str, loss: Loss[Any]) -> Iterator[Case]:
    shared = [*plan.overrides, *(plan.lists if loss.uses_lists else []), f"method={member}"]
    for model, settings in plan.grids[grid].items():
        seen = []
        for setting in settings:
            with_kl = setting.get("kl", False)
            if with_kl and loss.uses_beta:
                continue
            alpha = float(setting.alpha) if loss.uses_alpha else None
            beta = float(setting.beta) if loss.uses_beta or with_kl else None
            if (alpha, beta) in seen:
                continue
            seen.append((alpha, beta))
            chosen = [f"model={model}", *plan.models[model]]
            chosen.append(f"regularizer={'enumerated_kl' if with_kl else 'none'}")
            chosen += [f"{key}={value}" for key, value in (("alpha", alpha), ("beta", beta)) if value is not None]
            yield Case(member, str(model), alpha, beta, (*shared, *chosen))


def run_case(case: Case, folder: Path, number: int, tolerance: float, config_dir: str | None) -> Verdict:
    """Train one case as ``spo train`` does, and measure the distance to its optimum."""
    overrides = [*case.overrides, f"paths.cache={folder / 'cache'}"]
    composed = compose(overrides, config_dir=config_dir, run_dir=folder / str(number))
    check_config(composed)
    cfg = resolve_values(composed)
    seed_everything(cfg.seed, workers=True, verbose=False)
    prepared = prepare_run(cfg)
    parts = assemble(cfg, prepared, [])
    assert parts.exact is not None
    try:
        parts.trainer.fit(parts.module, datamodule=parts.data)
        measured = parts.exact.measure(parts.module)
        optimum = parts.exact.optimum(parts.module)
    except NonFiniteError:
        measured, optimum = {}, None  # a training that diverges is a result, not an error
    found = {key: _finite(measured.get(key)) for key in ("tv", "entropy", "entropy_optimum")}
    return Verdict(
        method=method_name(cfg),
        model=case.model,
        alpha=case.alpha,
        beta=case.beta,
        tv=found["tv"],
        entropy=found["entropy"],
        entropy_predicted=found["entropy_optimum"],
        optimum="none" if optimum is None else optimum.found,
        passed=found["tv"] is not None and found["tv"] <= tolerance,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(title="trained policies against the optimum of what they minimize", caption=CAPTION, box=SIMPLE_HEAD)
    for name in ("method", "model", "alpha", "beta", "tv", "entropy", "predicted", ""):
        table.add_column(name, justify="left" if name in ("method", "model", "") else "right", no_wrap=True)
    for verdict in verdicts:
        reached, predicted = (
            "" if number is None else f"{number:.4f}" for number in (verdict.entropy, verdict.entropy_predicted)
        )
        table.add_row(
            verdict.method,
            verdict.model,
            *("" if number is None else f"{number:g}" for number in (verdict.alpha, verdict.beta)),
            "none" if verdict.tv is None else f"{verdict.tv:.0e}",
            reached,
            predicted + ("*" if verdict.optimum == "numerical" else " "),
            "[green]pass[/]" if verdict.passed else "[red]FAIL[/]",
        )
    return table


CAPTION = (
    "tv: total variation to the optimum, which the loss states in closed form or (*) which was found numerically. "
    "Entropies in nats per response. For methods that do not read beta it is the weight of the exact KL."
)
