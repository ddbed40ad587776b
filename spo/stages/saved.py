"""End of a training: the checks of what was trained, its files, and the memory that it no longer needs."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import nn

from spo.callbacks.history import HistoryLogger
from spo.config.coefficients import COEFFICIENTS
from spo.evaluation.saved_policy import TrainedPolicy, rows_to_compare
from spo.models import NoReference
from spo.models.run_state import save_loss, save_reference
from spo.models.saving import save_policy, whole_policy, whole_state_dict
from spo.module import AlignmentModule
from spo.processes import rank, share
from spo.records import filenames
from spo.records.files import replacing, write_json
from spo.records.policy import write_policy_digests
from spo.runs.provenance import record_stop
from spo.stages.assemble import Parts
from spo.stages.checkpointing import ChosenWeights, choose_weights
from spo.stages.from_config import eval_device
from spo.stages.prepare import Prepared
from spo.stages.trained import Start, check_steps, check_weights, note_unmoved


@dataclass(frozen=True)
class Saved:
    """Facts about a training whose policy is saved, in the first process.

    Attributes:
        step: Optimizer step of the saved policy.
        policy: Trained policy, as the saved one has to be.
        budget: Metrics of what was trained.
    """

    step: int
    policy: TrainedPolicy
    budget: dict[str, float]


def save_training(
    cfg: DictConfig, prepared: Prepared, run_dir: Path, parts: Parts, start: Start, record: HistoryLogger
) -> Saved | None:
    """Check what was trained, and write all that an evaluation reads.

    All processes call this. The first one writes, and the others wait until they may read.

    Args:
        cfg: Configuration of the run, resolved.
        prepared: Pairs and tokenizer.
        run_dir: Run directory.
        parts: Module and trainer after training.
        start: Weights before training.
        record: History of the run.

    Returns:
        Facts about the training in the first process; ``None`` in the others.

    Raises:
        UserError: The run did not train what its record says, or its policy cannot be saved.
    """
    module, trainer = parts.module, parts.trainer
    weights, saved = whole_state_dict(module.policy, run_dir), None
    if rank() == 0:
        record_stop(run_dir, check_steps(trainer.global_step, cfg.trainer.max_steps, parts.stop))
        after = weights or dict(module.policy.named_parameters())
        steps, skipped = trainer.global_step, len(module.guard.skipped)
        budget = module.trained.metrics() | check_weights(start, after, steps, cfg, record.rows(), skipped)
        note_unmoved(cfg.reference.get("every") if module.reference.moves else None, steps - skipped)
    if rank() == 0 or weights is not None:  # Each process holds a part of a sharded policy.
        chosen = choose_weights(cfg, module, trainer, weights)
    if rank() == 0:
        saved = Saved(chosen.step, _save(cfg, prepared, run_dir, module, chosen), budget)
    share(None)
    return saved


def _save(
    cfg: DictConfig, prepared: Prepared, run_dir: Path, module: AlignmentModule, chosen: ChosenWeights
) -> TrainedPolicy:
    """Write policy, loss, reference and coefficients, and return what the saved policy has to be."""
    for reference in module.references:
        reference.to(torch.device("cpu"))  # Makes room for the forward passes of the policy.
    final = {name: getattr(module, name)(chosen.step) for name in COEFFICIENTS}
    write_json(run_dir / filenames.COEFFICIENTS, final)
    rows = rows_to_compare(prepared.pairs.train)
    load = partial(prepared.spec.policy, prepared.start, seed=cfg.seed)
    policy, weights = whole_policy(module.policy, chosen.whole, load)
    trained = TrainedPolicy(policy, rows, module.speed, eval_device(cfg), weights)
    kept = None if weights is None else {**weights}  # Saving empties the mapping that it gets.
    with replacing(run_dir / filenames.POLICY) as folder:
        save_policy(policy, prepared.tokenizer, folder, kept, prepared.stop_ids)
    save_loss(module.loss, run_dir)
    save_reference(module.reference.state_dict(), run_dir)
    write_policy_digests(run_dir)
    return trained


def release_models(module: AlignmentModule, trainer: Trainer) -> None:
    """Drop the models and the optimizer of a training, whose memory the evaluation needs. It loads what was saved.

    Args:
        module: Module after training, which cannot be trained any more.
        trainer: Its trainer.
    """
    for optimizer in trainer.optimizers:
        optimizer.param_groups.clear()
        optimizer.state.clear()
    module.policy, module.reference = nn.Module(), NoReference()
    module.extra_references, module.references = {}, []
    del module.make_optimizer  # It knows the policy.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
