"""Checkpoints of a run: the last step, to resume from, and the best ones."""

from __future__ import annotations

import math
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as BaseCheckpoint

from spo.bounds import NonNegativeInt, PositiveInt
from spo.callbacks.history import HistoryLogger
from spo.errors import UserError
from spo.module import AlignmentModule
from spo.notes import collected_notes, restore_notes
from spo.records import filenames
from spo.records.checkpoint_folders import RUN_KEY, remove_checkpoint, take_place, unfinished_path
from spo.records.files import remove
from spo.wording import suggestion

HISTORY_KEY = "history"
"""Entry of a checkpoint that holds ``history.jsonl`` up to its step: compressed text as a tensor of bytes."""
NOTES_KEY = "notes"
"""Entry of a checkpoint that holds the counts of the notes until its step; those of version 0.1.0 lack it."""
STEP_FILES = "step-*.ckpt"


class Checkpoint(BaseCheckpoint):
    """``last.ckpt`` at every validation, and the best checkpoints by a metric.

    Each is written under a temporary name and renamed, so a process that is killed meanwhile leaves the earlier one.
    It is a file, or a folder if the policy is sharded. ``best.ckpt`` is the best checkpoint. With ``top_k`` above 1,
    the best ones are also ``step-N.ckpt``. Of equal values, the earlier step is better; a value that is not finite is
    never among the best.

    Args:
        dirpath: Folder of the checkpoints.
        monitor: Logged metric of the validation that decides which checkpoints are the best.
        mode: Whether the best is the lowest (``"min"``) or the highest (``"max"``).
        every_n_steps: Optimizer steps between writes of ``last.ckpt`` in addition to those at validations; ``None``
            for none. The defaults are those of runs of version 0.1.0, whose configurations do not have these keys.
        top_k: Number of best checkpoints to keep, 0 for none.

    Attributes:
        run: Digest of the run's identity, which checkpoints carry; ``None`` outside of runs.
        best: Values of the best checkpoints by step, best first.
    """

    def __init__(
        self,
        dirpath: str,
        monitor: str,
        mode: Literal["min", "max"],
        every_n_steps: PositiveInt | None = None,
        top_k: NonNegativeInt = 1,
    ) -> None:
        self.folder, self.monitor, self.mode = Path(dirpath).expanduser(), monitor, mode
        self.every_n_steps, self.top_k = every_n_steps, top_k
        self.run: str | None = None
        self.best: dict[int, float] = {}
        self._saved_step = 0  # A run that has not trained does not need a checkpoint.
        self._first_step: int | None = None

    @property
    def last_path(self) -> Path:
        """Return the path of ``last.ckpt``."""
        return self.folder / filenames.LAST_CHECKPOINT

    @property
    def best_path(self) -> Path:
        """Return the path of ``best.ckpt``."""
        return self.folder / filenames.BEST_CHECKPOINT

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the module to be called when a step is complete: a hook for callbacks runs before the module's own."""
        if isinstance(pl_module, AlignmentModule):
            pl_module.step_listeners.append(self._on_step_complete)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which step is saved already."""
        self._saved_step = trainer.global_step

    def _on_step_complete(self, trainer: Trainer) -> None:
        at_interval = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        # Data without selection pairs has the checkpoints of validations without the validations.
        if at_interval or (_is_time_to_validate(trainer) and not validation_follows(trainer)):
            self.save_last(trainer)

    def save_last(self, trainer: Trainer) -> None:
        """Write ``last.ckpt``, unless this step is saved or a validation follows it, which saves it.

        Lightning would skip the validation of a run that resumes from a checkpoint between step and validation.
        """
        if trainer.global_step != self._saved_step and not validation_follows(trainer):
            self._save(trainer, self.last_path)
            self._saved_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last.ckpt``, and the best ones if this validation is among them."""
        value = self._value(trainer)
        if trainer.sanity_checking:
            return
        if value is not None:
            self._rank(trainer, value)
        self._save(trainer, self.last_path)
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state if the last step did not validate."""
        if trainer.global_step != self._saved_step:
            self._save(trainer, self.last_path)
            self._saved_step = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """Return the values of the best checkpoints."""
        return {"best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.best = dict(state_dict["best"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the identity of the run, its notes, and its history, from which a damaged file is repaired."""
        checkpoint[RUN_KEY] = self.run
        checkpoint[NOTES_KEY] = collected_notes()
        if (history := _history(trainer)) is not None and history.path.exists():
            packed = bytearray(zlib.compress(history.path.read_bytes()))
            checkpoint[HISTORY_KEY] = torch.frombuffer(packed, dtype=torch.uint8)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the notes, some of which only the steps before the checkpoint give rise to."""
        restore_notes(checkpoint.get(NOTES_KEY, {}))

    def _value(self, trainer: Trainer) -> float | None:
        """Return the value of the monitored metric on every process; ``None`` where it is absent or not finite.

        A metric that a callback could not measure this time, as its ``unanswered`` states, may follow later.

        Raises:
            UserError: The first validation does not log the metric.
        """
        if self.top_k == 0:
            return None
        metrics: dict[str, Any] = dict(trainer.callback_metrics)
        if (history := _history(trainer)) is not None:
            metrics |= history.row(trainer.global_step)  # with metrics that callbacks send to loggers only
        # Only the first process has a history, and all must agree on what to save.
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        late = {name for callback in callbacks for name in getattr(callback, "unanswered", ())}
        known, value = trainer.strategy.broadcast((sorted(metrics.keys() | late), metrics.get(self.monitor)))
        if self.monitor not in known and trainer.global_step == self._first_validation(trainer):
            names = [name for name in known if name.startswith("val/") and "/health/" not in name]
            raise UserError(
                f"callbacks.checkpoint.monitor={self.monitor}: the validation does not log this metric; choose one "
                f"of {', '.join(names)}, or set callbacks.checkpoint.top_k=0{suggestion(self.monitor, names)}"
            )
        found = math.nan if value is None else float(value)
        return found if math.isfinite(found) else None

    def _first_validation(self, trainer: Trainer) -> int:
        if self._first_step is None:
            self._first_step = trainer.global_step
        return self._first_step

    def _rank(self, trainer: Trainer, value: float) -> None:
        """Save this step if it is among the best, and remove those that are not any more."""
        step = trainer.global_step
        values = {**{earlier: known for earlier, known in self.best.items() if earlier < step}, step: value}
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(values, key=lambda one: (sign * values[one], one))[: self.top_k]
        self.best = {one: values[one] for one in ranked}
        if step not in self.best:
            return
        path = self.best_path if self.top_k == 1 else self._step_path(step)
        self._save(trainer, path)
        if trainer.is_global_zero and self.top_k > 1:
            if ranked[0] == step:
                _link(path, self.best_path)
            for earlier in set(self.folder.glob(STEP_FILES)) - {self._step_path(one) for one in ranked}:
                remove_checkpoint(earlier)

    def _step_path(self, step: int) -> Path:
        return self.folder / STEP_FILES.replace("*", str(step))

    def _save(self, trainer: Trainer, path: Path) -> None:
        # A run resumed from a checkpoint does not log that step again, so the rows up to it must be on disk first.
        for logger in trainer.loggers:
            logger.save()
        unfinished = unfinished_path(path)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove(unfinished)  # A folder that failed before may hold shards of more processes.
        trainer.strategy.barrier()
        try:
            trainer.save_checkpoint(unfinished)  # Every process takes part, and waits for the others.
        except OSError:
            if trainer.is_global_zero:
                remove(unfinished)
            raise
        if trainer.is_global_zero:
            take_place(path)
        trainer.strategy.barrier()


def validation_follows(trainer: Trainer) -> bool:
    """Return whether a validation follows the optimizer step just done."""
    return _is_time_to_validate(trainer) and not trainer.fit_loop.epoch_loop.val_loop.skip


def _is_time_to_validate(trainer: Trainer) -> bool:
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def checkpoint_callback(trainer: Trainer) -> Checkpoint | None:
    """Return the callback that writes the checkpoints of a run, ``None`` if there is none."""
    return next((one for one in trainer.checkpoint_callbacks if isinstance(one, Checkpoint)), None)


def _history(trainer: Trainer) -> HistoryLogger | None:
    if not trainer.is_global_zero:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, HistoryLogger)), None)


def _link(checkpoint: Path, name: Path) -> None:
    """Give a checkpoint a second name, in place of an earlier one, without a copy where the file system has links."""
    second = unfinished_path(name)
    remove(second)
    if checkpoint.is_dir():
        shutil.copytree(checkpoint, second, copy_function=_link_file)
    else:
        _link_file(checkpoint, second)
    take_place(name)


def _link_file(file: str | Path, name: str | Path) -> None:
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)
