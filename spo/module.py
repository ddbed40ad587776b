"""The alignment step: one LightningModule for every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from spo.errors import memory_for
from spo.forward.sharding import Sharding, reshard, shard
from spo.forward.speed import Speed, compile_blocks
from spo.guard import Guard, StageKeys
from spo.losses import Loss
from spo.metrics.sums import SumsAndCounts
from spo.metrics.trained import Trained
from spo.models.optimizer import clip_gradients
from spo.models.reference import Reference
from spo.objective import Enumeration, Pairs, Part, Prompts, parameters_of
from spo.objective.learned import Statistics, check_state, fit_dtype, share_gradients, share_tensors, tensors_of
from spo.random_state import gather_random_states, restore_random_state
from spo.regularizers import Regularizer
from spo.schedules import Schedule
from spo.types import PreferenceBatch, Window
from spo.watch import (
    HEALTH_METRICS,
    LOSS_SCALE,
    Controllers,
    Probe,
    ProbeSettings,
    completion_health,
    warn_of_loss_scale,
)

STEP_METRICS = ("loss", "grad_norm", "alpha", "beta", "lr", "buffer/age", "buffer/tokens")
SAVES_MEMORY = "set model.gradient_checkpointing=true, model.dtype=bfloat16 or model=hf_lora"
TIME_METRICS = ("sampling_s", "step_s", "probe_s")


class AlignmentModule(LightningModule):
    """Trains a policy on preferences with any loss, regularizer and reference.

    The objective of a step is the sum of what its parts declare: the mean loss over the pairs of a
    :class:`~spo.types.Window`, on all ranks and whatever the micro-batches, plus the regularizer's part. Optimization
    is manual, since Lightning would average over micro-batches instead.

    Args:
        policy: Hugging Face causal language model to train.
        loss: Loss of the method.
        regularizer: Divergence from the reference.
        reference: Source of reference log-probs, attached if it is needed.
        alpha: Schedule of the softness.
        beta: Schedule of the method's temperature, or of the regularizer's weight.
        optimizer: Function from trainable parameters to an optimizer.
        scheduler: Function from the optimizer to its learning-rate schedule, one step per optimizer step.
        prompts: Prompts to sample from while training.
        probe: Settings of the probe, which measures kl and entropy; ``None`` turns it off.
        clip_norm: Largest gradient norm, or ``None`` for no limit.
        micro_batch_size: Most pairs per forward pass, which is twice as many samples; ``None`` for no limit.
        micro_batch_tokens: Most tokens per forward pass of samples, or ``None`` for no limit.
        log_every_n_steps: Optimizer steps per row of ``history.jsonl``.
        seed: Random seed of the run.
        speed: Switches of how log-probs are computed.
        enumeration: Every response to every prompt, if the data set can be enumerated.
        keys: Configuration keys that messages about a step name.
        extra_references: Further references that the loss declares, by name.
        sharding: Settings of sharded models, which act under FSDP2 alone.

    Attributes:
        guard: Guard of the optimizer step. Without ``callbacks.nonfinite`` it stops at the first loss or gradient that
            is not finite.
        speed: Switches as given; from the start of a fit on, those that policy and reference support.
        pairs: Part of the objective that is taken on the pairs.
        regularization: Part of the objective that the regularizer adds.
        controllers: Schedules that adjust themselves to what the probe measures.
        validated: Means of the last validation, under their names without ``val/``.
        step_listeners: Functions of the Trainer that are called when an optimizer step is complete and logged.
        trained: Steps, pairs and sampled tokens so far.
        statistics: Buffers of the loss before the step at hand.
    """

    def __init__(
        self,
        policy: nn.Module,
        loss: Loss[Any],
        regularizer: Regularizer,
        reference: Reference,
        *,
        alpha: Schedule,
        beta: Schedule,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler],
        prompts: Prompts,
        probe: ProbeSettings | None,
        clip_norm: float | None,
        micro_batch_size: int | None,
        micro_batch_tokens: int | None,
        log_every_n_steps: int,
        seed: int,
        speed: Speed,
        enumeration: Enumeration | None = None,
        keys: StageKeys | None = None,
        extra_references: Mapping[str, Reference] | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy, self.loss, self.regularizer, self.reference = policy, loss, regularizer, reference
        self.extra_references = extra_references or {}
        self.references = [reference, *self.extra_references.values()]
        self.alpha, self.beta = alpha, beta
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.prompts, self.enumeration = prompts, enumeration
        self.clip_norm = clip_norm
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.log_every_n_steps, self.seed = log_every_n_steps, seed
        self.speed, self.sharding = speed, sharding or Sharding()
        self.regularization = regularizer.part(self)
        self.pairs = Pairs(self, loss, self.regularization, regularizer.needs_reference_logits)
        self.parts: tuple[Part, ...] = (self.pairs, self.regularization)
        self.coefficients = {
            name: schedule
            for name, schedule, is_read in (("alpha", alpha, loss.uses_alpha), ("beta", beta, self.reads_beta))
            if is_read
        }
        self.controllers = Controllers(self.coefficients)
        self.probe = Probe(self, probe)
        self.guard = Guard(self, keys or StageKeys())
        # Before a checkpoint reads the metrics, which a skipped step must not reach.
        self.register_state_dict_pre_hook(lambda *_: self.guard.settle())
        # Checkpoints hold the sums by position, so the order of these names is part of their format.
        of_pairs = ("loss/preference", "loss/regularizer", *loss.metric_names)
        of_steps = (*STEP_METRICS, *self.controllers.metrics, *TIME_METRICS)
        self.train_metrics = SumsAndCounts((*of_pairs, *of_steps), gaps=loss.metric_names, of_processes=of_steps)
        of_validation = (*of_pairs, *HEALTH_METRICS, LOSS_SCALE)
        self.val_metrics = SumsAndCounts(of_validation, gaps=(*loss.metric_names, *HEALTH_METRICS, LOSS_SCALE))
        self.validated: dict[str, float] = {}
        self.step_listeners: list[Callable[[Trainer], None]] = []
        self.trained = Trained()
        self._resumed_random_states: Sequence[Mapping[str, Tensor]] = ()
        fit_dtype(loss, policy)
        self.statistics = Statistics(loss)
        # DDP would wait for parameters of the loss in a backward pass that does not use them; see `share_gradients`.
        self._ddp_params_and_buffers_to_ignore = list(tensors_of(loss))
        # The checkpoint of an adapter holds the adapter, not the frozen weights below it.
        self.strict_loading = all(parameter.requires_grad for parameter in policy.parameters())

    @property
    def reads_beta(self) -> bool:
        """Return whether beta acts at all in this composition."""
        return self.loss.uses_beta or self.regularizer.follows_beta

    @property
    def needs_reference_model(self) -> bool:
        """Return whether a reference model is available and loss, regularizer or probe score sequences with it."""
        of_loss = self.loss.uses_reference or self.loss.needs_reference_logits
        wanted = of_loss or self.regularizer.needs_reference or self.probe.settings is not None
        return wanted and self.reference.scores_samples

    @property
    def reference_follows(self) -> bool:
        """Return whether the reference acts after each step, which then has to be known as taken or skipped."""
        return type(self.reference).after_step is not Reference.after_step

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of the policy, then those of the loss."""
        return [p for p in self.policy.parameters() if p.requires_grad] + parameters_of(self.loss)

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self.trainer.world_size

    @property
    def is_log_step(self) -> bool:
        """Return whether a row of ``history.jsonl`` follows the step just done."""
        return self.global_step % self.log_every_n_steps == 0 or self.global_step == self.trainer.max_steps

    # --- the step ----------------------------------------------------------------------------------------------

    def training_step(self, window: Window, batch_idx: int) -> None:
        """Take one optimizer step, unless its loss or gradient is not finite."""
        with memory_for("a training step", *self.guard.keys.memory, otherwise=SAVES_MEMORY):
            self._step(window)

    def _step(self, window: Window) -> None:
        started, step = perf_counter(), self.global_step
        group = self.train_metrics.start_group()
        optimizer = cast(LightningOptimizer, self.optimizers())  # configure_optimizers makes one
        self.statistics.remember()  # Before the terms: several micro-batches update them when terms are prepared.
        terms = [term for part in self.parts for term in part.terms(window, step)]
        losses = []
        for position, term in enumerate(terms):
            with self._gradient_sync(enabled=position == len(terms) - 1):
                loss = term()
                self.manual_backward(loss)
            losses.append(loss.detach())
        share_gradients(self.loss, self.world_size)
        grad_norm = clip_gradients(self.trainable_parameters, self.clip_norm)
        loss = torch.stack(losses).sum()
        self.train_metrics.update(
            {
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": optimizer.param_groups[0]["lr"],
                **{name: schedule(step) for name, schedule in self.coefficients.items()},
            }
        )
        pairs = window.num_pairs * self.loss.inputs.PAIRS_PER_ROW
        self.trained.add_step(step, pairs)  # The guard takes a step back that it skips.
        with self.guard.gate(optimizer, loss, grad_norm, group):
            optimizer.step()
        optimizer.zero_grad()
        if self.reference_follows and step not in self.guard.skipped:
            self.reference.after_step(self.policy, self.global_step - len(self.guard.skipped))
        cast(LRScheduler, self.lr_schedulers()).step()
        self.train_metrics.update({"step_s": perf_counter() - started})

    def _gradient_sync(self, enabled: bool) -> AbstractContextManager[None]:
        strategy = self.trainer.strategy
        if not enabled and isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return nullcontext()

    def on_train_batch_end(self, outputs: Any, batch: Window, batch_idx: int) -> None:
        """Adjust the controllers that are due, log a row every ``log_every_n_steps``, and call the listeners."""
        self._adjust_and_log()
        for listener in self.step_listeners:
            listener(self.trainer)

    def _adjust_and_log(self) -> None:
        step = self.global_step
        if not (self.controllers.are_due(step) or self.is_log_step):
            return
        self.guard.settle()
        started = perf_counter()
        measured = self.probe.measure(self.prompts.train, "train", step)
        self.train_metrics.update({"probe_s": perf_counter() - started})
        self.train_metrics.update(self.controllers.adjust(measured, step))
        if self.is_log_step:
            row = self._training_row() | {f"train/{key}": value for key, value in measured.items()}
            self._log(row)
            self.log_dict(row, logger=False)

    def log_remaining_steps(self) -> None:
        """Log a row of the steps since the last one, if training stopped between two rows."""
        self.guard.settle()
        if self.trained.steps > 0 and not self.is_log_step:
            self._log(self._training_row())

    def _training_row(self) -> dict[str, float]:
        """Return the means over the steps since the last row, and begin the next one."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.guard.check_possible(data.train, "training", self.global_step - 1)
        means = self.train_metrics.compute()
        self.train_metrics.reset()
        return {f"time/{key}" if key in TIME_METRICS else f"train/{key}": value for key, value in means.items()}

    def _log(self, row: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(row, step=self.global_step)

    # --- validation --------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Clear the sums of the selection split."""
        self.guard.settle()
        self._check_references()
        self.val_metrics.reset()
        self.pairs.validated, self.pairs.scores = [], []

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Add one batch of the selection split."""
        with memory_for("a validation", *self.guard.keys.validation_memory):
            scored = self.pairs.score(batch)
            self._add_validated(self.pairs.validate(scored, self.global_step))
            self.val_metrics.update(completion_health(scored, self.prompts.stop_ids))

    def _add_validated(self, metrics: dict[str, Tensor]) -> None:
        if self.loss.uses_alpha and "rewards/margins" in metrics:
            metrics[LOSS_SCALE] = metrics["rewards/margins"].abs()
        self.val_metrics.update(metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the row of the selection split."""
        reshard(self.policy)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        step = self.global_step
        self.guard.check_possible(data.selection, "validation", step)
        self._add_validated(self.pairs.finish_validation(step))
        means = self.val_metrics.compute()
        # Before the probe, which would sample from a policy that may compute NaN.
        self.guard.check_validation(means["loss/preference"], data.selection, step)
        scale = means.pop(LOSS_SCALE, None)
        if scale is not None and step == 0:
            warn_of_loss_scale(scale, self.alpha(0))
        means |= self.probe.measure(self.prompts.selection, "val")
        divergence = self.regularization.validation_value(means)
        if divergence is not None:
            means["loss/regularizer"] = divergence
        means["loss"] = means["loss/preference"] + self.regularization.weight(step) * means.get("loss/regularizer", 0.0)
        self.guard.check_validation(means["loss"], data.selection, step)
        self.validated = means
        row = {f"val/{key}": value for key, value in means.items()}
        self._log(row)
        self.log_dict(row, logger=False)

    # --- life cycle --------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shard policy and references under FSDP2. Other strategies need nothing."""
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            shard(self.policy, mesh, self.sharding)
            for reference in self.references:
                reference.shard(mesh, self.sharding)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make one optimizer over the trainable parameters of policy and loss, and its learning-rate schedule."""
        optimizer = self.make_optimizer(self.trainable_parameters)
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def setup(self, stage: str) -> None:
        """Move the references to the device."""
        self._place_references()

    def on_fit_start(self) -> None:
        """Share the tensors of the loss, and resolve the speed switches that all models support on their device."""
        share_tensors(self.loss)
        models = [self.policy]
        if self.needs_reference_model:
            with self.reference.active(self.policy) as reference:
                models.append(reference)
        for extra in self.extra_references.values():
            with extra.active(self.policy) as reference:
                models.append(reference)
        self.speed = self.speed.resolve_for(*models)
        if self.speed.compile:
            compile_blocks(self.policy)

    def on_train_start(self) -> None:
        """Switch the policy to training mode, which Lightning leaves to the module."""
        self.policy.train()
        self._place_references()
        self.guard.start()

    def on_train_end(self) -> None:
        """Check the weights that training ends with and the references, and note the steps that were skipped."""
        self.guard.check_weights()
        self._check_references()
        self.guard.note_skipped()

    def _place_references(self) -> None:
        for reference in self.references:
            reference.to(self.device)

    def _check_references(self) -> None:
        for reference in self.references:
            reference.check_unmoved()

    def on_train_batch_start(self, batch: Window, batch_idx: int) -> None:
        """Restore a resumed random state: not earlier, since a data loader draws from it when it starts."""
        if self._resumed_random_states:
            restore_random_state(self._resumed_random_states, self.device, self.seed, self.global_step)
            self._resumed_random_states = ()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an exact resume needs beyond Lightning's own state; drop frozen weights.

        Raises:
            NonFiniteError: A step that was not taken ends the run, or the weights are not finite.
        """
        self.guard.check_weights()
        self._check_references()
        if state := self.reference.state_dict():
            checkpoint["reference"] = state
        checkpoint["skipped_steps"] = self.guard.skipped
        checkpoint["sample_buffer"] = self.regularization.state_dict()  # the name of version 0.1.0
        checkpoint["random_states"] = gather_random_states(self.device)
        checkpoint["controllers"] = self.controllers.state_dict()
        checkpoint["train_metrics"] = self.train_metrics.by_rank()  # `state_dict` has those of the first rank alone
        checkpoint["trained"] = self.trained.state_dict()
        if not self.strict_loading:
            parameters = self.policy.named_parameters(remove_duplicate=False)  # A tied head has a name of its own.
            frozen = {f"policy.{name}" for name, p in parameters if not p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` added.

        Raises:
            UserError: The loss of the checkpoint has other parameters or buffers.
        """
        if "reference" in checkpoint:
            self.reference.load_state_dict(checkpoint["reference"])
        self.regularization.load_state_dict(checkpoint["sample_buffer"])
        # Version 0.1.0 saved the state of the first process alone.
        self._resumed_random_states = checkpoint.get("random_states") or [{"cpu": checkpoint["torch_rng_state"]}]
        self.controllers.load_state_dict(checkpoint["controllers"])
        state = checkpoint.get("state_dict")  # absent for a sharded policy, whose strategy has loaded it by now
        if state is not None:
            check_state(self.loss, state)
        if (rows := checkpoint.get("train_metrics")) is not None and self._trainer is not None:  # newer than 0.1.0
            own = self.train_metrics.of_rank(rows, self.global_rank, self.world_size)
            if state is None:
                self.train_metrics.load_state_dict(own)
            else:
                state |= {f"train_metrics.{name}": tensor for name, tensor in own.items()}
        # Version 0.1.0 did not count pairs.
        unknown = {"steps": checkpoint["global_step"], "pairs": None, "sampled_tokens": None}
        self.trained.load_state_dict(checkpoint.get("trained", unknown))
        self.guard.skipped = checkpoint.get("skipped_steps", [])  # checkpoints of version 0.1.0 lack it
