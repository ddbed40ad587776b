"""The end of training by a signal, where the run can be resumed exactly."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as BaseCheckpoint

from spo import signals
from spo.callbacks.checkpoint import checkpoint_callback, validation_follows
from spo.module import AlignmentModule


class Interruption(BaseCheckpoint):
    """Stops training after the step in which a signal came, or after its validation, with a checkpoint.

    All processes of a run stop after the same step. It is a checkpoint callback, because Lightning calls those after
    all others.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the module to be called when a step is complete."""
        if isinstance(pl_module, AlignmentModule):
            pl_module.step_listeners.append(self._on_step_complete)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Defer signals; from here on there is something to save."""
        # Lightning's own handlers end training in the middle of a step, or save there.
        signals.reinstall()
        signals.defer(True)

    def _on_step_complete(self, trainer: Trainer) -> None:
        if not validation_follows(trainer):
            self._stop_if_received(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the validation that belongs to the step; the checkpoint is written by now."""
        if not trainer.sanity_checking:
            self._stop_if_received(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let signals interrupt at once again."""
        self._stop_if_received(trainer)
        signals.defer(False)
        signals.raise_received()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let signals interrupt at once again: training has ended."""
        signals.defer(False)

    def _stop_if_received(self, trainer: Trainer) -> None:
        signum = _received_anywhere(trainer)
        if signum == 0:
            return
        callback = checkpoint_callback(trainer)
        if callback is not None:
            callback.save_last(trainer)
        if signals.hand_back(signum):
            return
        words = f"step {trainer.global_step} is in {callback.last_path}" if callback else "there is no checkpoint"
        raise signals.Interrupted(signum, words)


def _received_anywhere(trainer: Trainer) -> int:
    """Return the largest number of a signal that a process of the run has received, 0 for none."""
    signum = signals.received() or 0
    if trainer.world_size == 1:
        return signum
    number = torch.tensor(signum, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return int(number)
