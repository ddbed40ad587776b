"""Weights that lie beyond a trained model, evaluated like a run: ExPO (arXiv:2404.16792)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from spo.models.extrapolation import extrapolate_weights
from spo.processes import is_first_process
from spo.records import filenames
from spo.records.cache import build_alone, cached
from spo.records.digests import code_version, model_digest
from spo.records.files import read_mapping, write_json
from spo.stages.train import train

CODE_DEPENDENCIES = ("models/extrapolation.py", "records/parameters.py", "stages/extrapolate.py")
"""Files that cached extrapolated weights depend on."""


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
