"""The time that training waits for its data."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from spo.data.datamodule import PreferenceDataModule
from spo.module import AlignmentModule


class DataTime(Callback):
    """Log ``time/data_s``: seconds per step that the first process waited for its pairs, averaged since the last row.

    If ``data.num_workers`` is 0, that is the time to collate them.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        self._step, self._waited = trainer.global_step, _waited(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the mean to the row of ``history.jsonl``, if this step has one."""
        assert isinstance(pl_module, AlignmentModule)
        if not pl_module.is_log_step:
            return
        mean = (_waited(trainer) - self._waited) / (trainer.global_step - self._step)
        self._step, self._waited = trainer.global_step, _waited(trainer)
        for logger in trainer.loggers:
            logger.log_metrics({"time/data_s": mean}, step=trainer.global_step)


def _waited(trainer: Trainer) -> float:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, PreferenceDataModule)
    return data.waited_s
