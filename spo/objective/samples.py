"""The part of the objective that is taken on samples of the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from time import perf_counter

import torch
from torch import Tensor

from spo.forward.head import can_defer, completion_states, deferred_logits
from spo.objective.base import Divergence, Run, StepTerm
from spo.ops import Logits, concat_logits
from spo.sampling import SampleBuffer
from spo.types import Sequences, Window

MAX_REFERENCE_TOKENS = 16384
"""Tokens of buffered samples per forward pass of the reference where ``micro_batch_tokens`` sets no limit."""


@dataclass(frozen=True)
class SampleSettings:
    """Settings for drawing and reusing samples; counts are over all processes.

    Attributes:
        refresh_every: Optimizer steps between two drawings.
        num_samples: Samples in the buffer, one per prompt drawn.
        batch_size: Samples used in each optimizer step.
        max_new_tokens: Length limit of a sample, in tokens.
    """

    refresh_every: int
    num_samples: int
    batch_size: int
    max_new_tokens: int


class SampleDivergence(Divergence):
    """A divergence on samples of the policy that are drawn from time to time and reused in between.

    Args:
        run: Run that the part belongs to.
        weight_at: Function from the value of beta to the coefficient.
        divergence: Function of policy logits ``(M, V)``, reference logits ``(M, V)`` and ``N`` sequences to ``(N,)``.
        settings: Numbers of samples and their length limit.
        probe_metric: Metric of the probe that estimates the same quantity at a validation, or ``None``.
    """

    def __init__(
        self,
        run: Run,
        weight_at: Callable[[float], float],
        divergence: Callable[[Logits, Logits, Sequences], Tensor],
        settings: SampleSettings,
        probe_metric: str | None = None,
    ) -> None:
        super().__init__(run, weight_at)
        self.divergence, self.settings, self.probe_metric = divergence, settings, probe_metric

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        """Return the prompts that samples are drawn for."""
        return self.run.prompts.regularizer or self.run.prompts.train

    @cached_property
    def buffer(self) -> SampleBuffer:
        """Return the samples in use. The buffer is made on first use, since the run learns its rank late."""
        run, settings = self.run, self.settings
        return SampleBuffer(
            self.prompts,
            refresh_every=settings.refresh_every,
            num_samples=settings.num_samples,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=run.prompts.stop_ids,
            pad_token_id=run.prompts.pad_token_id,
            sampler=run.speed.sampler,
            seed=run.seed,
            rank=run.global_rank,
            world_size=run.world_size,
        )

    def terms(self, window: Window, step: int) -> Iterator[StepTerm]:
        """Draw samples where they are due, and prepare one term per micro-batch of the step's samples."""
        buffer = self.fill(step)
        index = buffer.index(step)
        weight = self.weight(step)

        def term(part: list[int]) -> Tensor:
            samples = self.run.speed.arrange(buffer.held.rows(torch.tensor(part)))
            cached = buffer.reference_logits
            reference = None if cached is None else concat_logits([cached[i] for i in part])
            divergence = self._measure(samples.to_device_async(self.run.device), reference)
            self.run.train_metrics.update({"loss/regularizer": divergence})
            return weight * divergence.sum() / len(index)

        tokens = buffer.held.completion_length[index].sum().float()
        self.run.train_metrics.update({"buffer/age": float(buffer.age(step)), "buffer/tokens": tokens})
        return (partial(term, part) for part in self._cut(index, self.run.micro_batch_tokens))

    def fill(self, step: int) -> SampleBuffer:
        """Return the buffer, with new samples where they are due at ``step``, and with the reference's logits."""
        buffer = self.buffer
        started, stale = perf_counter(), buffer.is_stale(step)
        if stale:
            buffer.refresh(self.run.policy, step)
            self.run.trained.add_samples(self._over_processes(int(buffer.held.completion_length.sum())))
        # The logits of a reference that moves would soon be those of other weights.
        if self.run.speed.keep_reference and not self.run.reference.moves and buffer.reference_logits is None:
            buffer.reference_logits = self._reference_logits(buffer.held)
        if stale:
            self.run.train_metrics.update({"sampling_s": perf_counter() - started})
        return buffer

    def _over_processes(self, count: int) -> int:
        total = torch.tensor(count, device=self.run.device)
        if self.run.world_size > 1:
            torch.distributed.all_reduce(total)
        return int(total)

    def validation_value(self, means: Mapping[str, float]) -> float | None:
        """Return the probe's estimate on fresh samples, since those of the buffer are stale."""
        return None if self.probe_metric is None else means.get(self.probe_metric)

    def state_dict(self) -> dict[str, object]:
        """Return the samples in use and the step at which they were drawn."""
        return self.buffer.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore the samples of :meth:`state_dict`."""
        self.buffer.load_state_dict(state)

    def _measure(self, samples: Sequences, reference: Logits | None) -> Tensor:
        run = self.run
        policy = run.speed.logits(run.policy, samples)
        if reference is None:
            with run.reference.active(run.policy) as model:
                reference = run.speed.logits(model, samples)
        return self.divergence(policy, reference, samples)

    def _reference_logits(self, samples: Sequences) -> list[Logits] | None:
        """Return ``(c, V)`` reference logits of each sample, or ``None`` if the model's head does not allow it.

        They are deferred, that is held as hidden states, if all of them are more than ``speed.max_logits``.
        """
        run = self.run
        logits_of_rows: list[Logits] = []
        with run.reference.active(run.policy) as reference:
            if not can_defer(reference):
                return None
            all_tokens = int(samples.completion_length.sum())
            for part in self._cut(list(range(len(samples))), run.micro_batch_tokens or MAX_REFERENCE_TOKENS):
                rows = samples.rows(torch.tensor(part))
                states = completion_states(reference, run.speed.arrange(rows).to_device_async(run.device))
                logits = deferred_logits(reference, states, run.speed.max_logits)
                fits = run.speed.max_logits is None or all_tokens <= logits.rows
                logits_of_rows += (logits.materialize() if fits else logits).split(rows.completion_length.tolist())
        return logits_of_rows

    def _cut(self, samples: list[int], max_tokens: int | None) -> Iterator[list[int]]:
        run = self.run
        # A pair is two sequences, so as many samples as a micro-batch of pairs has sequences fit a forward pass.
        size = len(samples) if run.micro_batch_size is None else 2 * run.micro_batch_size
        if max_tokens is not None:
            # Each sample counts as the longest there can be, so that all processes cut alike.
            longest = max(map(len, self.prompts)) + self.settings.max_new_tokens
            size = min(size, max(max_tokens // longest, 1))
        return (samples[first : first + size] for first in range(0, len(samples), size))
