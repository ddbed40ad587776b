"""The answer to a loss or gradient that is not finite."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy

from spo.bounds import PositiveInt
from spo.errors import UserError
from spo.module import AlignmentModule


class NonFinite(Callback):
    """Choose whether a step without a finite loss and gradient ends the run, or is skipped.

    Neither changes weights or optimizer state: the module has a guard before the optimizer step, which stops where this
    callback is absent.

    Args:
        action: ``"stop"`` ends the run before the step, ``"skip"`` continues with the next one. A skipped step counts
            as a step and advances the schedules. A validation loss that is not finite ends the run, or is noted.
        max_skipped: Largest number of steps to skip in a run, resumed or not. One more ends it.
    """

    def __init__(self, action: Literal["stop", "skip"], max_skipped: PositiveInt) -> None:
        self.action, self.max_skipped = action, max_skipped

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Configure the guard of the module.

        Raises:
            UserError: Steps cannot be skipped with this strategy.
        """
        assert isinstance(pl_module, AlignmentModule)
        if self.action == "skip" and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise UserError("callbacks.nonfinite.action=skip: DeepSpeed cannot leave a step out; use action=stop")
        pl_module.guard.max_skipped = self.max_skipped if self.action == "skip" else 0
