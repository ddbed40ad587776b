"""The part of the objective that is taken on samples of the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
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
        """Return the samples in use. The buffer is made on first use, since ``speed`` is resolved late."""
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
        )

    def terms(self, window: Window, step: int) -> Iterator[StepTerm]:
        """Draw samples where they are due, and prepare one term per micro-batch of this process's samples."""
        run, buffer = self.run, self.fill(step)
        index = buffer.index(step)
        weight, world_size = self.weight(step), run.world_size
        share, count = self._share(index, run.global_rank)

        def term(first: int, part: list[int]) -> Tensor:
            samples = run.speed.arrange(buffer.held.rows(torch.tensor(part)))
            cached = buffer.reference_logits
            reference = None if cached is None else concat_logits([cached[i] for i in part])
            divergence = self._measure(samples.to_device_async(run.device), reference)[: max(count - first, 0)]
            run.train_metrics.update({"loss/regularizer": divergence})
            # Gradients are averaged over processes, and the mean is that over all samples of the step.
            return weight * divergence.sum() / len(index) * world_size

        tokens = buffer.held.completion_length[index].sum().float()
        run.train_metrics.update({"buffer/age": float(buffer.age(step)), "buffer/tokens": tokens})
        parts = list(self._cut(share, run.micro_batch_tokens))
        starts = accumulate(map(len, parts), initial=0)
        return (partial(term, first, part) for first, part in zip(starts, parts, strict=False))

    def _share(self, index: list[int], rank: int) -> tuple[list[int], int]:
        """Return the samples that a process forwards, and how many of them count.

        All processes forward equally many, because they wait for each other in the passes of a sharded policy. The last
        one of a process with fewer repeats another sample and does not count.

        Args:
            index: Positions of the samples of a step.
            rank: Index of the process.
        """
        world_size = self.run.world_size
        own = index[rank::world_size]
        return own + index[: -(-len(index) // world_size) - len(own)], len(own)

    def fill(self, step: int) -> SampleBuffer:
        """Return the buffer, with new samples where they are due at ``step``, and with the reference's logits."""
        buffer = self.buffer
        started, stale = perf_counter(), buffer.is_stale(step)
        if stale:
            buffer.refresh(self.run.policy, step)
            self.run.trained.add_samples(int(buffer.held.completion_length.sum()))
        # The logits of a reference that moves would soon be those of other weights.
        if self.run.speed.keep_reference and not self.run.reference.moves and buffer.reference_logits is None:
            buffer.reference_logits = self._reference_logits(buffer, step)
        if stale:
            self.run.train_metrics.update({"sampling_s": perf_counter() - started})
        return buffer

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

    def _reference_logits(self, buffer: SampleBuffer, step: int) -> dict[int, Logits] | None:
        """Return ``(c, V)`` reference logits of each sample that this process will use, by its position.

        They are deferred, that is held as hidden states, if all of them are more than ``speed.max_logits``. The result
        is ``None`` if the model's head does not allow it.
        """
        run, samples = self.run, buffer.held
        used = self._used_until_refresh(buffer, step)
        # Equally many on all processes, which wait for each other in the passes of a sharded reference.
        most = max(map(len, used))
        own = used[run.global_rank]
        own += own[:1] * (most - len(own))
        all_tokens = max(int(samples.completion_length[one].sum()) for one in used)
        found: dict[int, Logits] = {}
        with run.reference.active(run.policy) as reference:
            if not can_defer(reference):
                return None
            for part in self._cut(own, run.micro_batch_tokens or MAX_REFERENCE_TOKENS):
                rows = samples.rows(torch.tensor(part))
                states = completion_states(reference, run.speed.arrange(rows).to_device_async(run.device))
                logits = deferred_logits(reference, states, run.speed.max_logits)
                fits = run.speed.max_logits is None or all_tokens <= logits.rows
                of_rows = (logits.materialize() if fits else logits).split(rows.completion_length.tolist())
                found |= zip(part, of_rows, strict=True)
        return found

    def _used_until_refresh(self, buffer: SampleBuffer, step: int) -> list[list[int]]:
        """Return the samples that each process forwards from a step on, until new ones are drawn."""
        # After as many steps as there are samples, at the latest, the steps use the same ones again.
        count = min(buffer.refresh_every - buffer.age(step), len(buffer.held))
        steps = [buffer.index(one) for one in range(step, step + count)]
        return [
            list(dict.fromkeys(i for index in steps for i in self._share(index, rank)[0]))
            for rank in range(self.run.world_size)
        ]

    def _cut(self, samples: list[int], max_tokens: int | None) -> Iterator[list[int]]:
        run = self.run
        # A pair is two sequences, so as many samples as a micro-batch of pairs has sequences fit a forward pass.
        size = len(samples) if run.micro_batch_size is None else 2 * run.micro_batch_size
        if max_tokens is not None:
            # Each sample counts as the longest there can be, so that all processes cut alike.
            longest = max(map(len, self.prompts)) + self.settings.max_new_tokens
            size = min(size, max(max_tokens // longest, 1))
        return (samples[first : first + size] for first in range(0, len(samples), size))
