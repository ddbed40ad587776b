"""Models, loss and coefficients of a finished run, loaded from its directory for an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from spo.config.coefficients import COEFFICIENTS
from spo.errors import UserError
from spo.evaluation.pair_metrics import Scoring
from spo.forward.speed import Speed
from spo.models import FrozenReference, Reference
from spo.models.run_state import load_loss, load_reference_state
from spo.records import filenames
from spo.records.files import read_mapping
from spo.schedules import Constant
from spo.stages.extra_references import load_extra_references, load_further_kl
from spo.stages.from_config import build_loss, eval_device, training_numerics
from spo.stages.prepare import Prepared
from spo.wording import finite


@dataclass(frozen=True)
class Models:
    """The models of an evaluation, on its device, and the speed settings that all of them support.

    Attributes:
        policy: Saved policy.
        reference: Reference of the comparison.
        speed: Speed settings.
        further: Models of ``evaluation.further_kl``, in the order of the configuration.
    """

    policy: torch.nn.Module
    reference: torch.nn.Module
    speed: Speed
    further: Sequence[torch.nn.Module] = ()


def load_models(cfg: DictConfig, prepared: Prepared, run_dir: Path) -> Models:
    """Load the saved policy and the model that training started from.

    Args:
        cfg: Configuration of the run, resolved.
        prepared: Prepared run with the model.
        run_dir: Run directory with ``policy/``.
    """
    device = eval_device(cfg)
    # As nn.Module, because the `to` of PreTrainedModel is wrapped in a way that hides its arguments from type checkers.
    saved: torch.nn.Module = prepared.spec.base(run_dir / filenames.POLICY)
    policy = saved.requires_grad_(False).to(device)
    reference = prepared.spec.start(prepared.base).to(device)
    further = [model.to(device) for model in load_further_kl(cfg, prepared)]
    return Models(policy, reference, Speed(**cfg.speed).resolve_for(policy, reference, *further), further)


def build_scoring(cfg: DictConfig, prepared: Prepared, run_dir: Path, models: Models) -> Scoring:
    """Return the loss and the references as they were at the end of training.

    Args:
        cfg: Configuration of the run, resolved.
        prepared: Prepared run with the model.
        run_dir: Run directory.
        models: Saved policy and the model that training started from.

    Raises:
        UserError: A file beside the policy is missing or damaged, or belongs to another loss.
    """
    loss = build_loss(cfg, models.policy)
    load_loss(loss, run_dir)
    device = eval_device(cfg)
    if isinstance(loss, torch.nn.Module):
        loss.requires_grad_(False).to(device)
    reference: Reference = instantiate(cfg.reference)
    further = load_extra_references(cfg, prepared)
    loaded: list[Reference] = list(further.values())
    if reference.needs_adapter or not reference.scores_samples:
        # The saved policy is merged, and stored log-probs are of other pairs: both come from the start of training.
        reference = FrozenReference()
    if loss.uses_reference or loss.needs_reference_logits:
        # The evaluation compares samples with the start of training, so a reference that moved needs its own copy.
        reference.attach(lambda: prepared.spec.start(prepared.base).to(device) if reference.moves else models.reference)
        if reference.moves:
            reference.load_state_dict(load_reference_state(run_dir))
            loaded.append(reference)
    speed = models.speed
    for one in loaded:
        one.to(device)
        with one.active(models.policy) as model, training_numerics(cfg, device, model):
            speed = speed.resolve_for(model)
    return Scoring(loss, _final_coefficients(cfg, run_dir), models.policy, reference, speed, further)


def _final_coefficients(cfg: DictConfig, run_dir: Path) -> dict[str, float]:
    """Return the final values of alpha and beta; of a damaged file, those that are constant.

    Raises:
        UserError: The file is missing or damaged, and a coefficient varies during training.
    """
    file = run_dir / filenames.COEFFICIENTS
    found = read_mapping(file) or {}
    final = {name: value for name in COEFFICIENTS if (value := finite(found.get(name))) is not None}
    for name in COEFFICIENTS:
        if name not in final and isinstance(schedule := instantiate(cfg[name]), Constant):
            final[name] = schedule(0)
    if missing := [name for name in COEFFICIENTS if name not in final]:
        raise UserError(
            f"{file} is missing or damaged, so the final value of {missing[0]} is unknown: move {filenames.METRICS} "
            f"away and resume the run (spo train --resume {run_dir}), which writes both again from the last checkpoint"
        )
    return final
