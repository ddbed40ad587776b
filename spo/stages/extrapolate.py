"""Weights that lie beyond a trained model, evaluated like a run: ExPO (arXiv:2404.16792)."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from spo.config.checks import check_config
from spo.config.compose import pin
from spo.errors import UserError, placed_by
from spo.metrics.catalogue import REFERENCE
from spo.models.extrapolation import extrapolate_weights
from spo.processes import first_decides, is_first_process, place
from spo.records import filenames
from spo.records.cache import build_alone, cached
from spo.records.digests import code_version, model_digest
from spo.records.files import read_mapping, visible_names, write_json
from spo.records.leftovers import remove_leftovers
from spo.records.parameters import find_model_folder
from spo.runs.another_run import never_trained, read_identity
from spo.runs.claim import locked
from spo.runs.identity import differences, identity
from spo.stages.devices import join_processes
from spo.stages.extrapolation_plan import Extrapolation
from spo.stages.factor_search import choose_factor
from spo.stages.from_config import resolve_values
from spo.stages.prepare import prepare_run
from spo.stages.quiet import quiet_libraries
from spo.stages.train import train

CODE_DEPENDENCIES = ("models/extrapolation.py", "records/parameters.py", "stages/extrapolate.py")
"""Files that cached extrapolated weights depend on."""


def extrapolate_command(plan: Extrapolation) -> dict[str, float]:
    """Write extrapolated weights, and evaluate them like a run where there is data to evaluate them on.

    Args:
        plan: Arguments of the command.

    Returns:
        The metrics; empty without an evaluation, and on other processes than the first.

    Raises:
        UserError: The models do not belong together, or the directory holds something else.
    """
    quiet_libraries()
    if plan.cfg is None:
        assert plan.first is not None and plan.factor is not None
        if place().is_first:
            _write_alone(plan.first, plan.second, plan.factor, plan.out)
        return {}
    cfg = plan.cfg
    if place().world_size > 1:
        join_processes(cfg)
    first = plan.first
    if first is None:
        assert plan.second_run is not None
        first = _reference_of(plan.second_run)
    cfg.model.path = str(first)
    pin(cfg)
    factor = plan.factor
    if factor is None:
        searched = evaluated_from(cfg, plan.second, plan.out)
        first_decides(partial(check_config, searched))
        key = {"run": first_decides(lambda: identity(searched)["digest"]), "select": plan.select}
        weights = partial(extrapolated_weights, cfg.paths.cache, first, plan.second)
        factor = choose_factor(searched, weights, key, plan.out, plan.select)
    start = extrapolated_weights(cfg.paths.cache, first, plan.second, factor) / filenames.POLICY
    first_decides(partial(_refuse_another_run, plan.out, evaluated_from(cfg, start, plan.out), factor))
    return extrapolated_run(cfg, first, plan.second, factor, plan.out)


def _reference_of(run: DictConfig) -> Path:
    """Return the model folder of the reference of a run, which is made again if the cache does not have it any more.

    Raises:
        UserError: The weights are not those that the run started from.
    """
    base = prepare_run(resolve_values(run)).base
    return first_decides(partial(_checked_reference, run, base))


def _checked_reference(run: DictConfig, base: str) -> Path:
    """Return the folder of a reference, and refuse one with other weights than the run recorded."""
    provenance = read_mapping(Path(run.paths.run) / filenames.PROVENANCE) or {}
    recorded = (provenance.get("inputs") or {}).get("reference_sha256")
    folder = find_model_folder(base)
    if folder is None:
        raise UserError(f"{REFERENCE}: {base} is not in the local cache of the hub: name a model folder")
    if recorded not in (None, model_digest(base)):
        raise UserError(
            f"{REFERENCE}: {base} holds other weights than those that {run.paths.run} started from: name this folder "
            "as the first model to use it nevertheless"
        )
    return folder.absolute()


def _refuse_another_run(out: Path, cfg: DictConfig, factor: float) -> None:
    """Refuse a directory with another run; the message lists the differences."""
    theirs = read_identity(out)
    if theirs is None or never_trained(out):
        return
    if lines := differences(theirs, identity(cfg)):
        there = (read_mapping(out / filenames.EXTRAPOLATION) or {}).get("factor", factor)
        if there != factor:  # It says what two folders of the cache do not.
            others = (line for line in lines if not line.startswith("model.start:"))
            lines = [f"factor: {there} there, {factor} now", *others]
        what = [f"{out} holds another run. What differs:", *(f"  - {line}" for line in lines)]
        raise UserError("\n".join([*what, "choose another --out, or move it away"]))


def _write_alone(first: Path, second: Path, factor: float, out: Path) -> None:
    """Write ``policy/`` in a directory that is not a run, unless it is there already."""
    facts = extrapolation_facts(first, second, factor)
    with placed_by("give another folder with --out", out), locked(out):
        remove_leftovers(out)
        found = read_mapping(out / filenames.EXTRAPOLATION)
        is_ours = found is not None and all(found.get(name) == value for name, value in facts.items())
        if not is_ours and visible_names(out):
            what = "something else" if found is None else f"the factor {found.get('factor')} or other models"
            raise UserError(f"{out} holds {what}: choose another --out, or move it away")
        if not is_ours or not (out / filenames.POLICY).is_dir():
            # First, so that an interrupted command finds its own directory.
            record_extrapolation(out, first, second, factor)
            extrapolate_weights(first, second, factor, out / filenames.POLICY)
    print(f"policy   {out / filenames.POLICY}")
    print("To evaluate it like a run, add the data and a judge, such as data=jsonl data.path=PAIRS.jsonl judge=MEMBER.")


def extrapolated_weights(cache: str | Path, first: Path, second: Path, factor: float) -> Path:
    """Return a folder whose ``policy/`` is ``second + factor * (second - first)``, from the cache if it is there.

    All processes of a run call this together.

    Args:
        cache: Folder of the cache.
        first: Model folder at factor -1.
        second: Model folder at factor 0.
        factor: Factor of the extrapolation.

    Raises:
        UserError: The models do not belong together.
    """
    key = {"code": code_version(*CODE_DEPENDENCIES), **extrapolation_facts(first, second, factor)}

    def build(folder: Path) -> None:
        extrapolate_weights(first, second, factor, folder / filenames.POLICY)

    return cached(cache, "extrapolated", key, build_alone(build))


def extrapolation_facts(first: Path, second: Path, factor: float) -> dict[str, Any]:
    """Return what extrapolated weights follow from: the factor, and the digests of both models.

    Args:
        first: Model folder at factor -1.
        second: Model folder at factor 0.
        factor: Factor of the extrapolation.
    """
    return {"factor": float(factor), "first": model_digest(first), "second": model_digest(second)}


def extrapolated_run(cfg: DictConfig, first: Path, second: Path, factor: float, run_dir: Path) -> dict[str, float]:
    """Evaluate extrapolated weights in a run directory, as a run without a training step, and return its metrics.

    The reference, the data and the judge are those of the configuration. A finished run is read. All processes of a
    run call this together.

    Args:
        cfg: Configuration of a run.
        first: Model folder at factor -1.
        second: Model folder at factor 0.
        factor: Factor of the extrapolation.
        run_dir: Run directory.

    Returns:
        The metrics; empty on other processes than the first.

    Raises:
        UserError: The models do not belong together, or the directory holds another run.
    """
    weights = extrapolated_weights(cfg.paths.cache, first, second, factor) / filenames.POLICY
    own = evaluated_from(cfg, weights, run_dir)
    with open_dict(own):
        own.tags = [*(own.get("tags") or []), f"extrapolated {factor:g}"]
    metrics = train(own)
    if is_first_process() and read_mapping(run_dir / filenames.EXTRAPOLATION) is None:
        record_extrapolation(run_dir, first, second, factor)
    return metrics


def record_extrapolation(folder: Path, first: Path, second: Path, factor: float) -> None:
    """Write ``extrapolation.json``: the factor, and where the models were and what they held.

    Args:
        folder: Folder with the extrapolated ``policy/``.
        first: Model folder at factor -1.
        second: Model folder at factor 0.
        factor: Factor of the extrapolation.
    """
    paths = {"first_path": str(first), "second_path": str(second)}
    write_json(folder / filenames.EXTRAPOLATION, {**extrapolation_facts(first, second, factor), **paths})


def evaluated_from(cfg: DictConfig, start: Path, run_dir: Path) -> DictConfig:
    """Return the configuration of a run that takes no training step, so that it evaluates given weights.

    Args:
        cfg: Configuration of a run, which stays as it is.
        start: Model folder to evaluate.
        run_dir: Run directory.
    """
    own = copy.deepcopy(cfg)
    with open_dict(own):  # The configuration of an older run does not have all of these keys.
        own.model.start = str(start)
        # The weights hold merged adapters. With a new one, the policy without it would not be the reference.
        own.model.lora = own.model.adapter_path = None
        own.reference = {"_target_": "spo.models.FrozenReference"}
        own.sft.max_steps = 0
        own.trainer.max_steps, own.trainer.max_epochs = 0, None
        own.evaluation.policy = "last"
        own.rerun = False
        own.paths.run = str(run_dir.absolute())
    return own
