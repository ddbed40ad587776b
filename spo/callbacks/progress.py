"""The progress bar, with the numbers that tell how an alignment run is going."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

SHOWN = {
    "train/loss": "loss",
    "train/rewards/margins": "margin",
    "train/rewards/accuracies": "acc",
    "train/kl": "kl",
    "train/entropy": "entropy",
    "val/loss": "val",
}


class Progress(RichProgressBar):
    """Counts optimiser steps and shows loss, margin, accuracy, kl and entropy as they were last logged."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "optimiser steps"

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The last logged values, shortened."""
        logged = trainer.callback_metrics
        return {short: f"{float(logged[name]):.3g}" for name, short in SHOWN.items() if name in logged}
