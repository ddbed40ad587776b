"""Arguments of ``spo extrapolate``, read and checked before anything slow is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from spo.config.compose import compose
from spo.config.nodes import has_judge
from spo.errors import UserError
from spo.metrics.catalogue import REFERENCE
from spo.processes import place
from spo.records import filenames
from spo.records.files import visible_names
from spo.records.parameters import find_model_folder
from spo.records.policy import looks_like_run, saved_policy, verify_policy
from spo.runs.saved_config import load_config, refuse_redacted
from spo.stages.evaluation_config import trusted_evaluation
from spo.stages.sample_request import is_run_directory

NO_SCORE_MESSAGE = (
    "--search: there is neither a reward nor a judge that could tell a better factor: choose judge=MEMBER, or give a "
    "factor with --factor"
)
"""Message where nothing scores the candidates of a search."""


@dataclass(frozen=True)
class Extrapolation:
    """Checked arguments of ``spo extrapolate``.

    Attributes:
        first: Model folder at factor -1; ``None`` for the reference of the second run.
        second: Model folder at factor 0.
        factor: Factor of the extrapolation; ``None`` to search for it.
        select: Metric that chooses the factor in a search, ``None`` for the default.
        out: Directory of the result.
        cfg: Configuration by which the result is evaluated, its interpolations unresolved; ``None`` to write the
            weights alone.
        second_run: Configuration of the second run with its own data, which leads to its reference; ``None`` for a
            model folder.
    """

    first: Path | None
    second: Path
    factor: float | None
    select: str | None
    out: Path
    cfg: DictConfig | None
    second_run: DictConfig | None


def plan_extrapolation(
    first: str,
    second: str,
    factor: float | None,
    select: str | None,
    out: Path,
    overrides: Sequence[str] = (),
    allow: Sequence[str] = (),
    config_dir: str | None = None,
) -> Extrapolation:
    """Find the two models, and the configuration by which the result is evaluated.

    Args:
        first: Run directory, model folder, or ``reference`` for the reference of the second run.
        second: Run directory or model folder.
        factor: Factor of the extrapolation; ``None`` to search for it.
        select: Metric that chooses the factor in a search, ``None`` for the default.
        out: Directory of the result.
        overrides: Overrides of the evaluation, as of ``spo evaluate`` for a run, of ``spo train`` for a folder.
        allow: Targets, modules and paths of the configuration of a run that may be used.
        config_dir: Folder with further members of the groups.

    Raises:
        UserError: A model or a setting is missing, or the configuration asks for something that needs the caller's
            word.
    """
    if factor is not None:
        _check_factor(factor)
    run_dir, second_run, cfg = Path(second), None, None
    if looks_like_run(run_dir):
        second_run = load_config(run_dir)
        cfg = trusted_evaluation(second_run, run_dir, overrides, allow, config_dir)
        refuse_redacted(cfg)
    elif overrides:
        cfg = compose(["model=hf", *overrides], config_dir, out)
    first_folder = _first_folder(first, second, second_run)
    _refuse_foreign(out)
    if cfg is not None:
        if factor is None:
            _refuse_unscored(cfg)
        with open_dict(cfg):
            cfg.model.initial, cfg.model.path = None, None if first_folder is None else str(first_folder)
            if _chosen_devices(overrides) is None:  # The training may have had more devices than there are here.
                cfg.trainer.devices, cfg.trainer.num_nodes = place().local_world_size, place().nodes
    elif factor is None:
        raise UserError(
            "--search: two model folders do not say on which prompts to search: add overrides such as "
            "data=jsonl data.path=PAIRS.jsonl judge=MEMBER"
        )
    return Extrapolation(first_folder, _model_folder(second), factor, select, out, cfg, second_run)


def start_processes(arguments: Sequence[str], overrides: Sequence[str]) -> int | None:
    """Start the processes that an override asks for, and return their exit status; ``None`` if one process suffices.

    Args:
        arguments: Arguments of the command.
        overrides: Overrides among them.
    """
    wanted = _chosen_devices(overrides) or ""
    if place().world_size > 1 or not wanted.isdigit() or int(wanted) < 2:
        return None
    from spo.runs.supervise import supervise

    return supervise(["extrapolate", *arguments], int(wanted), 1, None)


def _chosen_devices(overrides: Sequence[str]) -> str | None:
    """Return the value of the last override of ``trainer.devices``, ``None`` without one."""
    wanted = [text.partition("=")[2] for text in overrides if text.startswith("trainer.devices=")]
    return wanted[-1] if wanted else None


def _check_factor(factor: float) -> None:
    """Refuse a factor that is not finite, or that leads away from both models.

    Raises:
        UserError: The factor is one of these.
    """
    if not math.isfinite(factor):
        raise UserError(f"--factor {factor}: must be a finite number, such as 0.5")
    if factor < -1:
        raise UserError(
            f"--factor {factor:g} leads beyond the first model, away from the second: exchange the two models and "
            f"write --factor {-1 - factor:g}"
        )


def _first_folder(first: str, second: str, second_run: DictConfig | None) -> Path | None:
    """Return the first model folder, ``None`` for the reference of the second run.

    Raises:
        UserError: There is no such model, or the reference is not a model folder.
    """
    if first != REFERENCE or Path(REFERENCE).exists():
        return _model_folder(first)
    if second_run is None:
        raise UserError(
            f"{REFERENCE}: {second} is a model folder, and only a run has a reference: name the first model"
        )
    if OmegaConf.select(second_run, "model.adapter_path") is not None:
        raise UserError(
            f"{REFERENCE}: the reference of {second} is a model with an adapter (model.adapter_path): name a "
            "folder in which it is merged, such as policy/ of the run that trained it"
        )
    return None


def _model_folder(given: str) -> Path:
    """Return the model folder of a run directory, a model folder, or a model of the hub in the local cache.

    Raises:
        UserError: There is no model, or the policy of the run was changed.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        if not is_run_directory(path):
            return path.absolute()
        verify_policy(path)
        return saved_policy(path).absolute()
    folder = find_model_folder(given)
    if folder is None:
        raise UserError(f"{given}: there is neither a run directory nor a model folder of this name; check the path")
    return folder.absolute()


def _refuse_foreign(out: Path) -> None:
    """Refuse a directory that holds neither a run nor an extrapolation, before anything is computed."""
    known = (filenames.IDENTITY, filenames.CONFIG, filenames.FACTOR_SEARCH, filenames.EXTRAPOLATION)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: there is a file in place of a folder; choose another --out")
    is_ours = any((out / name).exists() for name in known)
    if not is_ours and (found := visible_names(out)):
        raise UserError(f"{out} holds something else ({', '.join(found[:3])}): choose another --out, or move it away")


def _refuse_unscored(cfg: DictConfig) -> None:
    """Refuse a search without a score or without prompts.

    Raises:
        UserError: There is neither a reward nor a judge, or no selection prompt.
    """
    if not has_judge(cfg):
        raise UserError(NO_SCORE_MESSAGE)
    if cfg.evaluation.selection_prompts == 0:
        raise UserError("--search: evaluation.selection_prompts=0 leaves no prompt to search on: set it to 64 or more")
