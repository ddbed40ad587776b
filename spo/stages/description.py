"""Names of a run, in titles and on dashboards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from spo.config.coefficients import COEFFICIENTS, unused_coefficients
from spo.records import filenames
from spo.records.files import read_mapping
from spo.records.iteration import iteration_of, read_iteration
from spo.records.operational_keys import CHOICES
from spo.runs.processes import sweep_dir
from spo.tracking import RunDescription


def method_name(cfg: DictConfig) -> str:
    """Return ``method.name``, or the name of the loss if the yaml of a method outside the package has no name."""
    return cfg.method.get("name") or cfg.method.loss._target_.rpartition(".")[2].removesuffix("Loss").lower()


def title(cfg: DictConfig) -> str:
    """Return the name of the method with its title, for the panel at the start."""
    return ": ".join(filter(None, [method_name(cfg), cfg.method.get("title")]))


def describe(cfg: DictConfig, run_dir: Path, *, recorded: Sequence[Mapping[str, Any]]) -> RunDescription:
    """Return the run as dashboards list it: its name, and one tag for each part of it.

    Args:
        cfg: Configuration of the run, resolved.
        run_dir: Run directory with ``config.yaml`` and ``provenance.json``.
        recorded: Rows of the history from before a resume.
    """
    parts = [method_name(cfg), *_coefficients(cfg), f"seed-{cfg.seed}"]
    in_sweep = sweep_dir() is not None or (run_dir.parent / filenames.SWEEP).exists()
    name, group = "_".join(parts), run_dir.parent.name if in_sweep else None
    if (directory := iteration_of(run_dir)) is not None:
        place = run_dir.absolute().relative_to(directory).parts
        # Two sweeps over iterations may have directories of the same names.
        sweep = f"{directory.parent.name}/" if (directory.parent / filenames.SWEEP).exists() else ""
        name, group = " ".join((*place, name)), f"{sweep}{directory.name}"
        parts += [f"iteration:{read_iteration(directory).name}", place[0]]
    # The record is read again, because it has the names of environment variables and not the secrets in them.
    config = OmegaConf.to_container(OmegaConf.load(run_dir / filenames.CONFIG))
    provenance = read_mapping(run_dir / filenames.PROVENANCE)
    return RunDescription(
        name=name,
        group=group,
        job_type=method_name(cfg),
        tags=[*parts, *_sources(cfg), *cfg.tags],
        config={**config, "provenance": provenance},  # type: ignore[dict-item]
        directory=run_dir,
        recorded=recorded,
        # Null outside of an iteration, and absent in runs of earlier versions.
        first_step=OmegaConf.select(cfg, "iteration.first_step") or 0,
    )


def _coefficients(cfg: DictConfig) -> list[str]:
    """Return the coefficients that the composition reads, such as ``alpha-0.05`` and ``beta-0.03``."""
    unused = unused_coefficients(cfg)
    return [f"{name}-{instantiate(cfg[name])}" for name in COEFFICIENTS if name not in unused]


def _sources(cfg: DictConfig) -> list[str]:
    """Return data and model, such as ``data:stories`` and ``model:tiny``; files and hub names by their last part."""
    chosen = cfg.get(CHOICES) or {}  # Runs of version 0.1 do not have the key.
    paths = {group: OmegaConf.select(cfg, f"{group}.path") for group in ("data", "model")}
    names = {group: Path(path).name if path else chosen.get(group) for group, path in paths.items()}
    return [f"{group}:{name}" for group, name in names.items() if name]
