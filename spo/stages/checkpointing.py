"""Training with checkpoints: their place and identity, and the weights that a run evaluates and saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.fsdp import FSDPModule

from spo.callbacks.checkpoint import checkpoint_callback
from spo.errors import UserError
from spo.models.saving import whole_state_dict
from spo.models.sharded_state import load_shards, read_whole
from spo.models.sharded_strategy import ShardedStrategy, WholeCheckpointIO
from spo.module import AlignmentModule
from spo.objective.learned import PREFIX
from spo.processes import rank, share
from spo.records import filenames
from spo.records.files import read_json
from spo.runs.checkpoints import is_of_run, read_checkpoint
from spo.runs.identity import known_digests
from spo.signals import Interrupted, received
from spo.stages.assemble import Parts
from spo.stages.prepare import Prepared

BEST = "best"


@dataclass(frozen=True)
class ChosenWeights:
    """The weights that a run evaluates and saves; policy, loss and reference of the module have them.

    Attributes:
        step: Optimizer step that they are from.
        whole: All weights of a sharded policy, gathered on the first rank; ``None`` for any other policy.
    """

    step: int
    whole: dict[str, Any] | None


def checkpoint_folder(cfg: DictConfig) -> Path | None:
    """Return the folder of the checkpoints that the configuration names, ``None`` if there are none."""
    folder = OmegaConf.select(cfg, "callbacks.checkpoint.dirpath")
    return None if folder is None else Path(str(folder)).expanduser()


def prepare_checkpoints(cfg: DictConfig, trainer: Trainer, run_dir: Path, prepared: Prepared) -> None:
    """Let checkpoints carry the identity of the run, and check that the best one can be chosen.

    Raises:
        UserError: The best checkpoint is wanted, and the data does not have pairs to choose it by.
    """
    callback = checkpoint_callback(trainer)
    if callback is not None:
        callback.run = next(iter(known_digests(read_json(run_dir / filenames.IDENTITY))), None)
    if _wants_best(cfg) and not prepared.pairs.selection:
        raise UserError(
            "evaluation.policy=best: the selection split does not have a pair to choose a checkpoint by; set "
            "data.splits.selection to a larger share, or evaluation.policy=last"
        )


def fit(parts: Parts, checkpoint: str | None) -> None:
    """Train from a checkpoint, or from the start.

    Args:
        parts: Module, data and trainer.
        checkpoint: Path of the checkpoint, or ``None``.

    Raises:
        Interrupted: A signal came.
        UserError: The checkpoint is a folder of shards, which the strategy cannot read.
    """
    trainer = parts.trainer
    if checkpoint is not None and Path(checkpoint).is_dir() and not isinstance(trainer.strategy, ShardedStrategy):
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UserError(f"strategy=deepspeed cannot resume from the shards in {checkpoint}; choose strategy=fsdp")
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
    try:
        trainer.fit(parts.module, datamodule=parts.data, ckpt_path=checkpoint, weights_only=True)
    except Exception as error:
        # A signal to all processes ends the workers that load data, and the step at hand fails.
        if (signum := received()) is not None:
            raise Interrupted(signum, "the step at hand failed") from error
        raise


def choose_weights(
    cfg: DictConfig, module: AlignmentModule, trainer: Trainer, last: dict[str, Any] | None
) -> ChosenWeights:
    """Return the weights that ``evaluation.policy`` names, and load them into the module.

    All processes call this if the policy is sharded; else the first one alone may.

    Args:
        cfg: Configuration of the run, resolved.
        module: Module after training.
        trainer: Trainer of the run.
        last: All weights of a sharded policy after training; ``None`` for any other policy.

    Raises:
        UserError: The best checkpoint is wanted and is missing, damaged, or that of another step or run.
    """
    callback, run_dir = checkpoint_callback(trainer), Path(cfg.paths.run)
    if not _wants_best(cfg) or callback is None or trainer.global_step == 0:
        return ChosenWeights(trainer.global_step, last)
    if not callback.best:
        raise UserError(
            f"evaluation.policy=best: no validation has a finite {callback.monitor}; resume with evaluation.policy=last"
        )
    step = next(iter(callback.best))
    if step == trainer.global_step:
        return ChosenWeights(step, last)
    path, is_sharded = callback.best_path, isinstance(module.policy, FSDPModule)

    def check() -> Mapping[str, Any] | None:
        found = read_checkpoint(path)
        return found if found and found["global_step"] == step and is_of_run(run_dir, found) else None

    # All processes take part in the loading of shards, and the first one alone checks that they are intact.
    checkpoint = check() if not is_sharded or rank() == 0 else None
    if not (share(checkpoint is not None) if is_sharded else checkpoint is not None):
        raise UserError(
            f"evaluation.policy=best: {path} is not the intact checkpoint of step {step} of this run; "
            "resume with evaluation.policy=last"
        )
    if is_sharded:
        checkpoint = load_shards(module, [], path, strict=module.strict_loading)
    else:
        checkpoint = read_whole(path) if path.is_dir() else checkpoint
        assert checkpoint is not None
        module.policy.load_state_dict(_below("policy.", checkpoint["state_dict"]), strict=module.strict_loading)
        if isinstance(module.loss, nn.Module):
            module.loss.load_state_dict(_below(PREFIX, checkpoint["state_dict"]))
    if "reference" in checkpoint:
        module.reference.load_state_dict(checkpoint["reference"])
    module.controllers.load_state_dict(checkpoint["controllers"])
    return ChosenWeights(step, whole_state_dict(module.policy, run_dir))


def _below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _wants_best(cfg: DictConfig) -> bool:
    return cfg.evaluation.get("policy") == BEST
