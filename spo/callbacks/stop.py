"""Why training ended before its last step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from spo.errors import UserError
from spo.module import AlignmentModule


class Stop(Callback):
    """Find out which callback stops training early, and stop a resumed run at the same step.

    Lightning forgets in a checkpoint that training was stopped. A run that is interrupted after that, in its
    evaluation, would train further when it resumes. A limit of time is the exception: its clock is in the checkpoint.

    Attributes:
        reason: Words for a person, or ``None`` for a run that trained all of its steps.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._restored: str | None = None
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the trainer, which :meth:`state_dict` asks."""
        self._trainer = trainer

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a run that a callback had stopped before it was interrupted."""
        trainer.should_stop = trainer.should_stop or self.reason is not None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a callback that monitors what a validation does not log. The first validation precedes training.

        Raises:
            UserError: There is such a callback.
        """
        known = trainer.callback_metrics
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            # Numbers of training are known only after the first steps.
            early = trainer.sanity_checking and str(monitor).startswith("train/")
            if isinstance(callback, EarlyStopping | ModelCheckpoint) and monitor not in (None, *known) and not early:
                names = ", ".join(name for name in sorted(known) if name.startswith("val/"))
                raise UserError(
                    f"{type(callback).__name__} monitors {monitor}, which the first validation does not log: choose "
                    f"one of {names}"
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the steps since the last row, because a run that stops early may end between two rows."""
        assert isinstance(pl_module, AlignmentModule)
        self.reason = trainer.strategy.broadcast(self.reason or find_reason(trainer))
        if self.reason is not None:
            pl_module.log_remaining_steps()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the reason of a resumed run that does not take a step, because its time is up."""
        self.reason = self.reason or find_reason(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the reason as it is now, without a limit of time."""
        assert self._trainer is not None
        return {"reason": self._restored or find_reason(self._trainer, timers=False)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the reason."""
        self.reason = self._restored = state_dict["reason"]


def find_reason(trainer: Trainer, timers: bool = True) -> str | None:
    """Return which callback stopped training and why, ``None`` if none did.

    Args:
        trainer: Trainer of the run.
        timers: Whether a limit of time counts.
    """
    if not trainer.should_stop or not trainer.fit_loop._can_stop_early:
        return None
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            return f"{type(callback).__name__}, because {_of_early_stopping(callback)}"
    if any(isinstance(callback, Timer) and (callback.time_remaining() or 1.0) <= 0 for callback in callbacks):
        return "trainer.max_time or a Timer ran out" if timers else None
    # Any other callback of the user may have set trainer.should_stop; Lightning does not record which one did.
    others = dict.fromkeys(type(callback).__name__ for callback in callbacks if _is_of_user(callback))
    return f"{' or '.join(others)} set trainer.should_stop" if others else None


def _of_early_stopping(callback: EarlyStopping) -> str:
    words = {
        EarlyStoppingReason.STOPPING_THRESHOLD: f"passed stopping_threshold={callback.stopping_threshold}",
        EarlyStoppingReason.DIVERGENCE_THRESHOLD: f"passed divergence_threshold={callback.divergence_threshold}",
        EarlyStoppingReason.NON_FINITE_METRIC: "is not finite",
        EarlyStoppingReason.PATIENCE_EXHAUSTED: f"did not improve in {callback.wait_count} validations",
    }
    return f"{callback.monitor} {words[callback.stopping_reason]}"


def _is_of_user(callback: Callback) -> bool:
    of_library = type(callback).__module__.partition(".")[0] in ("spo", "lightning")
    return not of_library or isinstance(callback, LambdaCallback)
