"""Win rate and samples at every validation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from spo.bounds import PositiveInt
from spo.callbacks.trackers import live_trackers
from spo.data import EvalPrompt
from spo.errors import JudgeError
from spo.evaluation import EvaluationSettings
from spo.evaluation.assess import Evaluation, assess
from spo.evaluation.completions import Draws, OtherModel, draw, draw_together
from spo.evaluation.judges import Judge
from spo.forward.modes import eval_mode
from spo.forward.sharding import gathered, needs_all_processes
from spo.forward.speed import Speed
from spo.metrics.catalogue import INTERVAL_ENDS, without_comparisons
from spo.module import AlignmentModule
from spo.records.files import read_jsonl, write_jsonl

log = logging.getLogger(__name__)
PREFIX = "val/samples/"
"""Beginning of the keys of the metrics of these samples."""
JUDGED_METRICS = ("win_rate", *(f"win_rate{end}" for end in INTERVAL_ENDS), "reward")
VALIDATION_METRICS = (*JUDGED_METRICS, "kl", "entropy", "length")


class ValidationSamples(Callback):
    """Sample completions of selection prompts at every validation, with the same random numbers each time.

    Logs these numbers of the same samples under ``val/samples/``: ``win_rate`` with its interval, which is wide for few
    prompts, ``reward``, ``kl`` (nats per sequence), ``entropy`` (nats per token) and ``length`` (tokens). Win rate and
    KL compare with the reference of the training. Writes the samples to ``samples.validation.jsonl``: rows as in
    ``samples.jsonl``, with their ``step``.

    A reference that cannot score samples gives neither win rate nor KL. If the judge fails, its verdicts are omitted
    and training continues.

    Args:
        path: File of the samples.
        num_prompts: Most prompts of the selection split, ``None`` for all of them.

    Attributes:
        unanswered: Keys that the last validation lacks because the judge failed.
    """

    def __init__(self, path: str, num_prompts: PositiveInt | None) -> None:
        self.path, self.num_prompts = Path(path), num_prompts
        self.unanswered: frozenset[str] = frozenset()
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
        """Sample with the prompts dealt to all processes; judge and write on the first."""
        assert isinstance(pl_module, AlignmentModule)
        if not self.prompts:
            return
        policy, reference = pl_module.policy, pl_module.reference
        with ExitStack() as stack:
            stack.enter_context(eval_mode(policy))
            stack.enter_context(gathered(policy))
            speed, other, models = pl_module.speed.resolve_for(policy), None, [policy]
            if reference.scores_samples:
                other = partial(reference.active, policy)
                with other() as model:
                    stack.enter_context(gathered(model))
                    models.append(model)
                    speed = speed.resolve_for(model)
                    if self._reference is None or reference.moves:
                        self._reference = self._draw(models, model, "reference", speed)
            ours = self._draw(models, policy, "policy", speed, other)
        if not trainer.is_global_zero:
            return
        found = self._assess(ours)
        row = {
            f"{PREFIX}{name}": found.metrics[f"eval/{name}"]
            for name in VALIDATION_METRICS
            if f"eval/{name}" in found.metrics
        }
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        rows = self._write(found.samples, trainer.global_step)
        for tracker in live_trackers(trainer):
            tracker.show_validation_samples(rows)

    def _assess(self, ours: Draws) -> Evaluation:
        self.unanswered = frozenset()
        try:
            return assess(self.prompts, ours, self._reference, self.settings, self.judge)
        except JudgeError as error:
            self.unanswered = frozenset(f"{PREFIX}{name}" for name in JUDGED_METRICS)
            if not self._warned:
                log.warning("the samples of this validation do not have verdicts, training continues: %s", error)
            self._warned = True
            return assess(self.prompts, ours, self._reference, self.settings, None)

    def _draw(
        self, models: Sequence[nn.Module], model: nn.Module, stage: str, speed: Speed, other: OtherModel | None = None
    ) -> Draws:
        settings = self.settings.of_reference() if stage == "reference" else self.settings
        # Processes have different numbers of passes for their prompts, so each takes all prompts with a model whose
        # passes need all processes.
        draws = draw if any(map(needs_all_processes, models)) else draw_together
        tokens = (self.stop_ids, self.pad_token_id)
        return draws(model, stage, self.prompts, settings, speed, *tokens, self.decode, lambda _: None, other)

    def _write(self, samples: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """Add the rows of a step, in place of those that an interrupted run wrote at this step or later; return all."""
        rows = read_jsonl(self.path) if self.path.exists() else []
        rows = [row for row in rows if row["step"] < step]
        # The completions of the reference are the same at every step.
        rows += [{"step": step, **without_comparisons(row)} for row in samples]
        write_jsonl(self.path, rows)
        return rows
