"""Checkpoints of a run: the last step, to resume from, and the best one."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from spo.records import filenames


class Checkpoint(ModelCheckpoint):
    """``last.ckpt`` and ``best.ckpt``, written at every validation; ``last.ckpt`` at the end of training too.

    Args:
        dirpath: Folder of the checkpoints.
        monitor: Logged metric that decides the best.
        mode: Whether the best is the lowest (``"min"``) or the highest (``"max"``).
    """

    def __init__(self, dirpath: str, monitor: str, mode: Literal["min", "max"]) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        # A run resumed from a checkpoint does not log that step again, so the rows up to it must be on disk first.
        for logger in trainer.loggers:
            logger.save()
        super()._save_checkpoint(trainer, filepath)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state if the last step did not validate."""
        super().on_train_end(trainer, pl_module)
        if trainer.global_step > self._last_global_step_saved:
            trainer.save_checkpoint(f"{self.dirpath}/{filenames.LAST_CHECKPOINT}")
