"""Win rate and samples while training, for those who want to look at every validation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedTokenizerBase

from spo.bounds import PositiveInt
from spo.data import EvalPrompt
from spo.errors import JudgeError
from spo.evaluation import EvaluationSettings
from spo.evaluation.assess import Evaluation, assess
from spo.evaluation.completions import Draws, draw
from spo.evaluation.judges import Judge
from spo.forward.speed import Speed
from spo.module import AlignmentModule
from spo.records.files import read_jsonl, write_jsonl
from spo.sampling import eval_mode

log = logging.getLogger(__name__)
LOGGED = ("win_rate", "win_rate_ci_low", "win_rate_ci_high", "reward")


class ValidationSamples(Callback):
    """At every validation draws completions of a few selection prompts, the same random numbers each time.

    Logs ``val/samples/reward`` and ``val/samples/win_rate`` with its interval, of few prompts and thus rough, and keeps
    the samples in ``samples.validation.jsonl``: rows as in ``samples.jsonl``, with their ``step``. A judge that fails
    leaves out its verdicts, not the training.

    Args:
        path: of that file.
        num_prompts: prompts of the selection split.
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
        tokenizer: PreTrainedTokenizerBase,
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """Takes what the run's final evaluation takes, but for the number of prompts and the opponents."""
        self.prompts = prompts[: self.num_prompts]
        self.settings = replace(settings, against=["reference"])
        self.judge, self.tokenizer, self.decode = judge, tokenizer, decode

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws on every process, as a sharded policy needs; judges and writes on the first."""
        assert isinstance(pl_module, AlignmentModule)
        if not self.prompts:
            return
        policy, reference = pl_module.policy, pl_module.reference
        with eval_mode(policy):
            ours = self._draw(policy, "policy", pl_module.speed)
            if self._reference is None and reference.scores_samples:
                with reference.active(policy) as model:
                    self._reference = self._draw(model, "reference", pl_module.speed)
        if not trainer.is_global_zero:
            return
        found = self._assess(ours)
        row = {
            f"val/samples/{name}": found.metrics[f"eval/{name}"] for name in LOGGED if f"eval/{name}" in found.metrics
        }
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        self._write(found.samples, trainer.global_step)

    def _assess(self, ours: Draws) -> Evaluation:
        try:
            return assess(self.prompts, ours, self._reference, self.settings, self.judge)
        except JudgeError as error:
            if not self._warned:
                log.warning("no verdicts on the samples of this validation, the training goes on: %s", error)
            self._warned = True
            return assess(self.prompts, ours, self._reference, self.settings, None)

    def _draw(self, model: Any, stage: str, speed: Speed) -> Draws:
        return draw(model, stage, self.prompts, self.settings, speed.resolve_for(model), self.tokenizer, self.decode)

    def _write(self, samples: Sequence[dict[str, Any]], step: int) -> None:
        """Adds the rows of a step; those of a run that was interrupted after it are written again."""
        rows = read_jsonl(self.path) if self.path.exists() else []
        rows = [row for row in rows if row["step"] < step] + [{"step": step, **row} for row in samples]
        write_jsonl(self.path, rows)
