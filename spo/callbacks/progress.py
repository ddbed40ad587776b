"""The progress bar, with the most telling metrics of an alignment run."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

SHORT_NAMES = {
    "train/loss": "loss",
    "train/rewards/margins": "margin",
    "train/rewards/accuracies": "acc",
    "train/kl": "kl",
    "train/entropy": "entropy",
    "val/loss": "val",
}


class Progress(RichProgressBar):
    """Count optimizer steps, and show loss, margin, accuracy, kl and entropy as they were last logged."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "optimizer steps"

    @property
    def total_train_batches(self) -> int | float:
        """Return the number of all steps: after a resume, the bar counts the earlier ones as well."""
        steps = self.trainer.max_steps
        return steps if steps > 0 else super().total_train_batches

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the last logged values, shortened."""
        logged = trainer.callback_metrics
        return {short: f"{float(logged[name]):.3g}" for name, short in SHORT_NAMES.items() if name in logged}
