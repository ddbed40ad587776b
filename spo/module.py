"""The alignment step: one LightningModule for every method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from spo.forward.head import can_defer, completion_states, deferred_logits
from spo.forward.speed import Speed, compile_blocks
from spo.losses import Loss
from spo.metrics.repetition import repetition
from spo.metrics.sums import SumsAndCounts
from spo.models.reference import Reference
from spo.ops import Logits, completion_targets, concat_logits, sum_per_sequence, token_entropy, token_kl, token_logps
from spo.regularizers import EnumeratedKL, GlobalKL, Regularizer
from spo.sampling import SampleBuffer, derive_seed, eval_mode, sample
from spo.schedules import Controller, Schedule
from spo.types import ListLogps, PairLogps, PreferenceBatch, Sequences, Window

log = logging.getLogger(__name__)
PAIR_METRICS = (
    "loss/preference",
    "loss/regularizer",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
HEALTH_METRICS = ("p_eos", "logps_per_token/chosen", "logps_per_token/rejected")
PROBE_METRICS = ("kl", "entropy", "length", "repetition", "finished")
STEP_METRICS = ("loss", "grad_norm", "alpha", "beta", "lr", "buffer/age", "buffer/tokens")
SCALE = "alpha * |margin|"
FILL_TOKENS = 16384
"""Of buffered samples that the reference is given at once, where ``micro_batch_tokens`` does not say."""
USUAL_SCALE = (0.05, 20.0)
"""alpha multiplies a sum over tokens: far outside, the loss is linear in the margin or a hinge, whatever alpha is."""
TIME_METRICS = ("sampling_s", "step_s", "probe_s")


@dataclass(frozen=True)
class ProbeSettings:
    """How the policy's samples are watched while training: the same way for every method.

    Attributes:
        num_prompts: policy samples drawn per measurement.
        max_new_tokens: their length limit.
    """

    num_prompts: int
    max_new_tokens: int


@dataclass(frozen=True)
class Prompts:
    """Token ids of the prompts that samples are drawn from while training, and the ids that end and pad them."""

    train: Sequence[Sequence[int]]
    selection: Sequence[Sequence[int]]
    eos_token_id: int
    pad_token_id: int


@dataclass(frozen=True)
class Enumeration:
    """Every response to each of ``num_prompts`` prompts, all responses of the first prompt first."""

    sequences: Sequences
    num_prompts: int


class Scored(NamedTuple):
    """A batch as policy and reference see it.

    Attributes:
        logps: of the pairs (or lists, if the loss reads them).
        divergence: ``(B,)`` the regularizer's mean over their responses, where it is taken on the batch's responses.
        tokens: ``(M,)`` log-probs of the policy for each completion token of the batch's sequences.
    """

    logps: PairLogps | ListLogps
    divergence: Tensor | None
    tokens: Tensor


class AlignmentModule(LightningModule):
    """Trains a policy on preferences with any loss, regularizer and reference.

    Optimisation is manual because a step's gradient is defined over a whole :class:`~spo.types.Window`: the sum over
    its pairs on all ranks divided by their number, whatever the micro-batches, plus the regularizer's mean over its
    own sequences.

    Args:
        policy: Hugging Face causal language model to train.
        loss: the method.
        regularizer: the divergence from the reference.
        reference: attached where it is needed.
        alpha: softness schedule.
        beta: schedule of the method's temperature, or of the regularizer's weight.
        optimizer: from trainable parameters to an optimizer.
        scheduler: from the optimizer to its learning-rate schedule, one step per optimiser step.
        prompts: for sampling while training.
        probe: how kl and entropy are watched; ``None`` turns it off.
        clip_norm: largest gradient norm, or ``None``.
        micro_batch_size: most pairs per forward, also used to cut the regularizer's samples, two for a pair; ``None``
            for no limit.
        micro_batch_tokens: most tokens per forward of samples, each counted as the longest there can be, so that all
            devices cut alike; ``None`` for no limit.
        log_every_n_steps: optimiser steps per row of the record.
        seed: of the run.
        speed: how log-probabilities are computed.
        enumeration: every response to every prompt, grouped by prompt, where the data set can be enumerated.

    Attributes:
        speed: as given; from the start of a fit on without what policy or reference do not take.
        validated: the means of the last validation, under their names without ``val/``.
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
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.loss = loss
        self.regularizer = regularizer
        self.reference = reference
        self.alpha, self.beta = alpha, beta
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.prompts, self.probe = prompts, probe
        self.clip_norm = clip_norm
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.log_every_n_steps, self.seed = log_every_n_steps, seed
        self.speed = speed
        self.enumeration = enumeration
        self.buffer: SampleBuffer | None = None
        self._resumed_buffer: dict[str, Any] = {}
        self._resumed_rng_state: Tensor | None = None
        reads = {"alpha": loss.uses_alpha, "beta": self.reads_beta}
        self.controllers = {
            name: schedule
            for name, schedule in (("alpha", alpha), ("beta", beta))
            if reads[name] and isinstance(schedule, Controller)
        }
        controlled = [f"{name}/{key}" for name, c in self.controllers.items() for key in (c.watches, "at_bound")]
        self.train_metrics = SumsAndCounts((*PAIR_METRICS, *STEP_METRICS, *controlled, *TIME_METRICS))
        self.val_metrics = SumsAndCounts((*PAIR_METRICS, *HEALTH_METRICS, SCALE))
        self.validated: dict[str, float] = {}
        # an adapter's checkpoint holds the adapter, not the frozen weights it sits on
        self.strict_loading = all(parameter.requires_grad for parameter in policy.parameters())

    @property
    def reads_beta(self) -> bool:
        """Whether beta acts at all in this composition."""
        return self.loss.uses_beta or self.regularizer.weight == "beta"

    # --- log-probabilities -------------------------------------------------------------------------------------

    def forward_logps(self, model: nn.Module, sequences: Sequences) -> tuple[Tensor, Tensor, Logits]:
        """Scores completions.

        Returns:
            ``(N,)`` summed log-probs, the ``(M,)`` of the tokens, and the ``(M, V)`` logits they came from.
        """
        logits = self.speed.logits(model, sequences)
        tokens = token_logps(logits, completion_targets(sequences))
        return sum_per_sequence(tokens, sequences), tokens, logits

    def score(self, batch: PreferenceBatch) -> Scored:
        """What the loss sees of a batch, and what else is read from the same forward passes."""
        sequences = batch.sequences
        policy_logps, policy_tokens, policy_logits = self.forward_logps(self.policy, sequences)
        reference_logps = divergence = None
        if self.regularizer.source == "dataset":
            with self.reference.active(self.policy) as reference:
                reference_logps, _, reference_logits = self.forward_logps(reference, sequences)
            divergence = batch.mean_per_pair(self.regularizer(policy_logits, reference_logits, sequences))
        elif self.loss.uses_reference:
            reference_logps = self.reference.pair_logps(batch, self.policy, self.speed)
        seen = batch.list_logps if self.loss.uses_lists else batch.pair_logps
        return Scored(seen(policy_logps, reference_logps), divergence, policy_tokens)

    def preference_terms(self, logps: PairLogps | ListLogps, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair or list, ``(B,)``, and the metrics that follow from its log-probs."""
        alpha, beta = self.alpha(step), self.beta(step)
        losses = self.loss(logps, alpha=alpha, beta=beta)
        return losses, {"loss/preference": losses, **self.loss.metrics(logps, alpha=alpha, beta=beta)}

    # --- the step ----------------------------------------------------------------------------------------------

    def training_step(self, window: Window, batch_idx: int) -> None:
        """One optimiser step."""
        started, step = perf_counter(), self.global_step
        optimizer = cast(LightningOptimizer, self.optimizers())  # configure_optimizers makes one
        terms = [*self._pair_terms(window, step), *self._sample_terms(step)]
        losses = []
        for position, term in enumerate(terms):
            with self._accumulating(last=position == len(terms) - 1):
                loss = term()
                self.manual_backward(loss)
            losses.append(loss.detach())
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        limit = float("inf") if self.clip_norm is None else self.clip_norm
        grad_norm = nn.utils.clip_grad_norm_(parameters, limit)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        cast(LRScheduler, self.lr_schedulers()).step()
        values = {"loss": torch.stack(losses).sum(), "grad_norm": grad_norm, "lr": learning_rate}
        self._record_step(step, {**values, "step_s": perf_counter() - started})

    def _accumulating(self, last: bool) -> Any:
        strategy = self.trainer.strategy
        if not last and isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return nullcontext()

    def _pair_terms(self, window: Window, step: int) -> Iterator[Callable[[], Tensor]]:
        # Gradients are averaged over ranks, so a sum over this rank's pairs is scaled back by their number.
        scale = self.trainer.world_size / window.num_pairs

        def term(batch: PreferenceBatch) -> Tensor:
            logps, divergence, _ = self.score(batch)
            losses, metrics = self.preference_terms(logps, step)
            total = losses.sum()
            if divergence is not None:
                metrics["loss/regularizer"] = divergence
                total = total + self.regularizer.weight_at(self.beta(step)) * divergence.sum()
            self.train_metrics.update(metrics)
            return total * scale

        return (partial(term, batch) for batch in window)

    def _sample_terms(self, step: int) -> Iterator[Callable[[], Tensor]]:
        if self.regularizer.source == "enumeration":
            return iter([partial(self._enumerated_term, step)])
        if self.regularizer.source != "policy":
            return iter(())
        buffer = self._filled_buffer(step)
        index = buffer.index(step)
        weight = self.regularizer.weight_at(self.beta(step))

        def term(part: list[int]) -> Tensor:
            samples = self.speed.arrange(buffer.held.rows(torch.tensor(part)))
            kept = buffer.reference_logits
            reference_logits = None if kept is None else concat_logits([kept[i] for i in part])
            divergence = self.divergence(samples.to_device_async(self.device), reference_logits)
            self.train_metrics.update({"loss/regularizer": divergence})
            return weight * divergence.sum() / len(index)

        tokens = buffer.held.completion_length[index].sum().float()
        self.train_metrics.update({"buffer/age": float(buffer.age(step)), "buffer/tokens": tokens})
        return (partial(term, part) for part in self._per_forward(index, self.micro_batch_tokens))

    def _per_forward(self, samples: list[int], most_tokens: int | None) -> Iterator[list[int]]:
        size = len(samples) if self.micro_batch_size is None else 2 * self.micro_batch_size
        if most_tokens is not None:
            assert isinstance(self.regularizer, GlobalKL)
            longest = max(map(len, self.prompts.train)) + self.regularizer.max_new_tokens
            size = min(size, max(most_tokens // longest, 1))
        return (samples[first : first + size] for first in range(0, len(samples), size))

    def _enumerated_term(self, step: int) -> Tensor:
        divergence = self.enumerated_divergence()
        self.train_metrics.update({"loss/regularizer": divergence})
        return self.regularizer.weight_at(self.beta(step)) * divergence.mean()

    def enumerated_divergence(self) -> Tensor:
        """``(P,)`` the regularizer's divergence for each enumerated prompt, with gradient."""
        assert isinstance(self.regularizer, EnumeratedKL) and self.enumeration is not None
        sequences = self.enumeration.sequences.to(self.device)
        policy_logps, *_ = self.forward_logps(self.policy, sequences)
        with self.reference.active(self.policy) as reference:
            reference_logps, *_ = self.forward_logps(reference, sequences)
        shape = (self.enumeration.num_prompts, -1)
        return self.regularizer.exact(policy_logps.view(shape), reference_logps.view(shape))

    def _filled_buffer(self, step: int) -> SampleBuffer:
        assert self.buffer is not None
        started, stale = perf_counter(), self.buffer.is_stale(step)
        if stale:
            self.buffer.refresh(self.policy, step)
        if self.speed.keep_reference and self.buffer.reference_logits is None:
            self.buffer.reference_logits = self._reference_logits(self.buffer.held)
        if stale:
            self.train_metrics.update({"sampling_s": perf_counter() - started})
        return self.buffer

    def _reference_logits(self, samples: Sequences) -> list[Logits] | None:
        """For each sample the reference's ``(c, V)`` logits, deferred where all of them are too many."""
        kept: list[Logits] = []
        with self.reference.active(self.policy) as reference:
            if not can_defer(reference):
                return None
            every = int(samples.completion_length.sum())
            for part in self._per_forward(list(range(len(samples))), self.micro_batch_tokens or FILL_TOKENS):
                rows = samples.rows(torch.tensor(part))
                states = completion_states(reference, self.speed.arrange(rows).to_device_async(self.device))
                logits = deferred_logits(reference, states, self.speed.max_logits)
                whole = self.speed.max_logits is None or every <= logits.rows
                kept += (logits.materialize() if whole else logits).split(rows.completion_length.tolist())
        return kept

    def divergence(self, samples: Sequences, reference_logits: Logits | None = None) -> Tensor:
        """``(N,)`` the regularizer's divergence on samples of the policy, with gradient.

        Args:
            samples: ``N`` sequences with ``M`` completion tokens in all.
            reference_logits: ``(M, V)``, where they were computed before.
        """
        policy_logits = self.speed.logits(self.policy, samples)
        if reference_logits is None:
            with self.reference.active(self.policy) as reference:
                reference_logits = self.speed.logits(reference, samples)
        return self.regularizer(policy_logits, reference_logits, samples)

    # --- monitoring --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def watch(self, prompts: Sequence[Sequence[int]], *seed: object) -> dict[str, float]:
        """What fresh samples of the policy show, the same for any number of processes.

        Returns:
            ``kl`` (nats per sequence, where a reference is at hand), ``entropy`` (nats per token), ``length`` (tokens),
            ``repetition`` (share of 4-grams that occurred before in their sample) and ``finished`` (share of samples
            that end within the limit).
        """
        if self.probe is None:
            return {}
        drawn_with = derive_seed("probe", self.seed, *seed)
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(drawn_with)).tolist()
        share = range(self.probe.num_prompts)[self.global_rank :: self.trainer.world_size]
        rows = share or range(1)  # who has nothing to measure samples with the others: shards are gathered together
        samples = sample(
            self.policy,
            [prompts[order[i % len(order)]] for i in rows],
            max_new_tokens=self.probe.max_new_tokens,
            temperature=1.0,
            eos_token_id=self.prompts.eos_token_id,
            pad_token_id=self.prompts.pad_token_id,
            seeds=[derive_seed(drawn_with, i) for i in rows],
            sampler=self.speed.sampler,
        )
        metric = SumsAndCounts(PROBE_METRICS).to(self.device)
        samples = self.speed.arrange(samples.to("cpu")).to(self.device)
        with eval_mode(self.policy):
            logits = self.speed.logits(self.policy, samples)
            found: dict[str, Tensor] = {"entropy": token_entropy(logits)}
            if self.needs_reference_model:
                with self.reference.active(self.policy) as reference:
                    reference_logits = self.speed.logits(reference, samples)
                found["kl"] = sum_per_sequence(token_kl(logits, reference_logits), samples)
        found["length"] = samples.completion_length
        found["finished"] = (samples.last_token == self.prompts.eos_token_id).float()
        found["repetition"] = torch.tensor([repetition(ids) for ids in samples.completions()])
        if share:
            metric.update(found)
        return metric.compute()

    @property
    def needs_reference_model(self) -> bool:
        """Whether loss, regularizer or the watched kl score sequences with the reference."""
        wanted = self.loss.uses_reference or self.regularizer.source is not None or self.probe is not None
        return wanted and self.reference.scores_samples

    def _record_step(self, step: int, values: dict[str, Tensor | float]) -> None:
        if self.loss.uses_alpha:
            values["alpha"] = self.alpha(step)
        if self.reads_beta:
            values["beta"] = self.beta(step)
        self.train_metrics.update(values)

    def on_train_batch_end(self, outputs: Any, batch: Window, batch_idx: int) -> None:
        """Lets the controllers that are due see the policy; writes a row of the record every ``log_every_n_steps``."""
        step = self.global_step
        due = {name: controller for name, controller in self.controllers.items() if step % controller.every == 0}
        if not (due or self.is_log_step):
            return
        started = perf_counter()
        watched = self.watch(self.prompts.train, "train", step)
        self.train_metrics.update({"probe_s": perf_counter() - started})
        for name, controller in due.items():
            self._adjust(name, controller, watched[controller.watches])
        if not self.is_log_step:
            return
        means = self.train_metrics.compute()
        self.train_metrics.reset()
        row = {f"time/{key}" if key in TIME_METRICS else f"train/{key}": value for key, value in means.items()}
        self._log(row | {f"train/{key}": value for key, value in watched.items()})

    def _adjust(self, name: str, controller: Controller, measured: float) -> None:
        was_saturated = controller.saturated
        controller.observe(measured)
        self.train_metrics.update(
            {f"{name}/{controller.watches}": measured, f"{name}/at_bound": float(controller.saturated)}
        )
        if controller.saturated and not was_saturated:
            self._warn_of_bound(name, controller, measured)

    @rank_zero_only
    def _warn_of_bound(self, name: str, controller: Controller, measured: float) -> None:
        log.warning(
            "%s stands at its bound %s.%s=%g from step %d on: %s is %.4g there, and its target is %g",
            name,
            name,
            "min" if controller.value == controller.min else "max",
            controller.value,
            self.global_step,
            controller.watches,
            measured,
            controller.target,
        )

    @property
    def is_log_step(self) -> bool:
        """Whether the step just done is followed by a row of the record."""
        return self.global_step % self.log_every_n_steps == 0 or self.global_step == self.trainer.max_steps

    def _log(self, row: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(row, step=self.global_step)
        self.log_dict(row, logger=False)

    # --- validation --------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Starts the selection split's sums afresh."""
        self.val_metrics.reset()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Adds one batch of the selection split."""
        logps, divergence, tokens = self.score(batch)
        _, metrics = self.preference_terms(logps, self.global_step)
        metrics |= self._health(batch, tokens)
        if divergence is not None:
            metrics["loss/regularizer"] = divergence
        if self.loss.uses_alpha and "rewards/margins" in metrics:
            metrics[SCALE] = metrics["rewards/margins"].abs()
        self.val_metrics.update(metrics)

    def _health(self, batch: PreferenceBatch, tokens: Tensor) -> dict[str, Tensor]:
        """P(EOS) where a chosen completion ends, and log-probs in nats per token: what a collapse shows in first."""
        sequences, mask = batch.sequences, batch.mask()
        per_token = batch.per_completion(sum_per_sequence(tokens, sequences) / sequences.completion_length)
        ends = batch.per_completion(sequences.last_token == self.prompts.eos_token_id)[0]  # a cut one has no EOS
        last = batch.per_completion(tokens[sequences.completion_length.cumsum(0) - 1])[0]
        return {
            "p_eos": last[ends].exp(),
            "logps_per_token/chosen": per_token[0],
            "logps_per_token/rejected": per_token[1:][mask[1:]],
        }

    def on_validation_epoch_end(self) -> None:
        """Writes the selection split's row."""
        means = self.val_metrics.compute()
        self._warn_of_scale(means.pop(SCALE, None))
        means |= self.watch(self.prompts.selection, "val")
        if self.regularizer.source == "policy" and "kl" in means:
            means["loss/regularizer"] = means["kl"]
        if self.regularizer.source == "enumeration":
            with torch.no_grad():
                means["loss/regularizer"] = float(self.enumerated_divergence().mean())
        weight = self.regularizer.weight_at(self.beta(self.global_step))
        means["loss"] = means["loss/preference"] + weight * means.get("loss/regularizer", 0.0)
        self.validated = means
        self._log({f"val/{key}": value for key, value in means.items()})

    @rank_zero_only
    def _warn_of_scale(self, scale: float | None) -> None:
        low, high = USUAL_SCALE
        if self.global_step > 0 or scale is None or low <= scale <= high:
            return
        log.warning(
            "alpha=%g times the margin of a pair starts at %.3g on average, far from order one: %s",
            self.alpha(0),
            scale,
            "it is small, and the loss hardly bends" if scale < low else "it is large, and most pairs are decided",
        )

    # --- life cycle --------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shards the policy under FSDP2: every block by itself, the rest together. Other strategies need nothing."""
        if self.device_mesh is None or isinstance(self.policy, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for blocks in [module for module in self.policy.modules() if isinstance(module, nn.ModuleList)]:
            for block in blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(self.policy, mesh=mesh)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """One optimizer over the trainable parameters, one learning-rate schedule."""
        optimizer = self.make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}

    def setup(self, stage: str) -> None:
        """Brings the reference to the device and makes the sample buffer."""
        self.reference.to(self.device)
        if self.regularizer.source == "policy" and self.buffer is None:
            regularizer = cast(GlobalKL, self.regularizer)  # whatever has this source has these counts
            self.buffer = SampleBuffer(
                self.prompts.train,
                refresh_every=regularizer.refresh_every,
                num_samples=regularizer.num_samples,
                batch_size=regularizer.batch_size,
                max_new_tokens=regularizer.max_new_tokens,
                eos_token_id=self.prompts.eos_token_id,
                pad_token_id=self.prompts.pad_token_id,
                sampler=self.speed.sampler,
                seed=self.seed,
                rank=self.global_rank,
                world_size=self.trainer.world_size,
            )

    def on_fit_start(self) -> None:
        """Finds out what policy and reference take, on the device where they will run."""
        models = [self.policy]
        if self.needs_reference_model:
            with self.reference.active(self.policy) as reference:
                models.append(reference)
        self.speed = self.speed.resolve_for(*models)
        if self.speed.compile:
            compile_blocks(self.policy)
        if self.enumeration is not None:
            arranged = self.speed.arrange(self.enumeration.sequences)
            self.enumeration = replace(self.enumeration, sequences=arranged)

    def on_train_start(self) -> None:
        """Sets the mode, which Lightning leaves as it finds it, and takes up a resumed buffer."""
        self.policy.train()
        self.reference.to(self.device)
        if self.buffer is not None:
            self.buffer.load_state_dict(self._resumed_buffer)

    def on_train_batch_start(self, batch: Window, batch_idx: int) -> None:
        """Takes up a resumed random state: not earlier, because a data loader draws from it when it starts."""
        if self._resumed_rng_state is not None:
            torch.set_rng_state(self._resumed_rng_state)
            self._resumed_rng_state = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what an exact resume needs beyond Lightning's own, such as the random state; drops frozen weights."""
        checkpoint["sample_buffer"] = {} if self.buffer is None else self.buffer.state_dict()
        checkpoint["torch_rng_state"] = torch.get_rng_state()
        checkpoint["controllers"] = {name: c.state_dict() for name, c in self.controllers.items()}
        if not self.strict_loading:
            frozen = {f"policy.{name}" for name, p in self.policy.named_parameters() if not p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes up what :meth:`on_save_checkpoint` kept."""
        self._resumed_buffer = checkpoint["sample_buffer"]
        self._resumed_rng_state = checkpoint["torch_rng_state"]
        for name, controller in self.controllers.items():
            controller.load_state_dict(checkpoint["controllers"][name])
