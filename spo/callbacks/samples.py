"""Win rate and samples at every validation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from spo.bounds import PositiveInt
from spo.callbacks.trackers import live_trackers
from spo.data import EvalPrompt
from spo.errors import JudgeError
from spo.evaluation import EvaluationSettings
from spo.evaluation.assess import Evaluation, assess
from spo.evaluation.completions import Draws, draw
from spo.evaluation.judges import Judge
from spo.forward.modes import eval_mode
from spo.forward.speed import Speed
from spo.metrics.catalogue import INTERVAL_ENDS
from spo.module import AlignmentModule
from spo.records.files import read_jsonl, write_jsonl

log = logging.getLogger(__name__)
VALIDATION_METRICS = ("win_rate", *(f"win_rate{end}" for end in INTERVAL_ENDS), "reward")


class ValidationSamples(Callback):
    """Sample completions of a few selection prompts at every validation, with the same random numbers each time.

    Logs ``val/samples/reward`` and ``val/samples/win_rate`` with its interval, which is wide for few prompts. Writes
    the samples to ``samples.validation.jsonl``: rows as in ``samples.jsonl``, with their ``step``. If the judge fails,
    its verdicts are omitted and training continues.

    Args:
        path: File of the samples.
        num_prompts: Number of prompts of the selection split.
    """

    def __init__(self, path: str, num_prompts: PositiveInt) -> None:
        self.path, self.num_prompts = Path(path), num_prompts
        self._reference: Draws | None = None
        self._warned = False

    def attach(
        self,
        prompts: Sequence[EvalPrompt],
        settings: EvaluationSettings,
        judge: Judge | None,
        stop_ids: Sequence[int],
        pad_token_id: int,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """Take what the final evaluation of the run takes, except for the number of prompts and the opponents.

        Args:
            prompts: Prompts of the selection split; the first ``num_prompts`` are used.
            settings: Settings of the final evaluation.
            judge: Judge of the final evaluation, or ``None``.
            stop_ids: Tokens that end a completion.
            pad_token_id: Token that fills rows up.
            decode: Function from token ids of a completion to its text.
        """
        self.prompts = prompts[: self.num_prompts]
        self.settings = replace(settings, against=["reference"])
        self.judge, self.decode = judge, decode
        self.stop_ids, self.pad_token_id = stop_ids, pad_token_id

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample on every process, as a sharded policy needs; judge and write on the first."""
        assert isinstance(pl_module, AlignmentModule)
        if not self.prompts:
            return
        policy, reference = pl_module.policy, pl_module.reference
        with eval_mode(policy):
            ours = self._draw(policy, "policy", pl_module.speed)
            if (self._reference is None or reference.moves) and reference.scores_samples:
                with reference.active(policy) as model:
                    self._reference = self._draw(model, "reference", pl_module.speed)
        if not trainer.is_global_zero:
            return
        found = self._assess(ours)
        row = {
            f"val/samples/{name}": found.metrics[f"eval/{name}"]
            for name in VALIDATION_METRICS
            if f"eval/{name}" in found.metrics
        }
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        rows = self._write(found.samples, trainer.global_step)
        for tracker in live_trackers(trainer):
            tracker.show_validation_samples(rows)

    def _assess(self, ours: Draws) -> Evaluation:
        try:
            return assess(self.prompts, ours, self._reference, self.settings, self.judge)
        except JudgeError as error:
            if not self._warned:
                log.warning("the samples of this validation do not have verdicts, training continues: %s", error)
            self._warned = True
            return assess(self.prompts, ours, self._reference, self.settings, None)

    def _draw(self, model: Any, stage: str, speed: Speed) -> Draws:
        speed = speed.resolve_for(model)
        tokens = (self.stop_ids, self.pad_token_id)
        return draw(model, stage, self.prompts, self.settings, speed, *tokens, self.decode)

    def _write(self, samples: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Add the rows of a step, in place of those that an interrupted run wrote at this step or later; return all."""
        rows = read_jsonl(self.path) if self.path.exists() else []
        rows = [row for row in rows if row["step"] < step] + [{"step": step, **row} for row in samples]
        write_jsonl(self.path, rows)
        return rows
