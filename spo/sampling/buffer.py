"""The buffer of policy samples, drawn from time to time and reused in between."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from typing import Any, Literal

import torch
from torch import nn

from spo import processes
from spo.ops import Logits
from spo.sampling.generate import sample
from spo.seeds import derive_seed
from spo.types import Sequences

log = logging.getLogger(__name__)


class SampleBuffer:
    """Policy samples for a regularizer, refreshed every ``refresh_every`` optimizer steps.

    The samples depend on the seed, the step and the weights alone, and not on the number of processes. Each process
    draws its share of them and then holds all of them, so a run resumes on any number of processes. They stay on the
    host, where cutting rows to their length does not wait for the device.

    Attributes:
        reference_logits: Logits of the reference by the position of a sample, or ``None``. The state leaves them out,
            because they follow from the samples.

    Args:
        prompts: Token ids of the prompts to draw from.
        refresh_every: Optimizer steps between two refreshes.
        num_samples: Number of samples in the buffer.
        batch_size: Number of samples per step, over all processes.
        max_new_tokens: Length limit of a sample in tokens.
        stop_ids: Tokens that end a sample.
        pad_token_id: Token id of padding.
        sampler: Sampler to use, see :func:`~spo.sampling.generate.sample`.
        seed: Seed of the run.
    """

    def __init__(
        self,
        prompts: Seq[Seq[int]],
        *,
        refresh_every: int,
        num_samples: int,
        batch_size: int,
        max_new_tokens: int,
        stop_ids: Seq[int],
        pad_token_id: int,
        sampler: Literal["static", "generate"],
        seed: int,
    ) -> None:
        self.prompts = prompts
        self.refresh_every = refresh_every
        self.num_samples, self.batch_size = num_samples, batch_size
        self.stop_ids = list(stop_ids)
        self.sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "stop_ids": self.stop_ids,
            "pad_token_id": pad_token_id,
            "sampler": sampler,
        }
        self.seed = seed
        self.drawn_at: int | None = None
        self.samples: Sequences | None = None
        self.reference_logits: dict[int, Logits] | None = None

    def is_stale(self, step: int) -> bool:
        """Return whether the buffer has to be refreshed at ``step``."""
        return self.drawn_at is None or step - self.drawn_at >= self.refresh_every

    def age(self, step: int) -> int:
        """Return the number of optimizer steps since the samples were drawn."""
        return 0 if self.drawn_at is None else step - self.drawn_at

    def refresh(self, policy: nn.Module, step: int) -> None:
        """Draw ``num_samples`` prompts and a sample for each.

        Prompts are drawn without replacement; only if there are fewer than ``num_samples``, they repeat. All processes
        call this, even those without a sample to draw, because the weights of a policy may be spread over processes.

        Args:
            policy: Model to draw from.
            step: Optimizer step, on which the seed depends.
        """
        seed = derive_seed("global_kl", self.seed, step, 0)
        order = torch.randperm(len(self.prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        own = processes.deal(range(self.num_samples))
        rows = own or [0]
        samples = sample(
            policy,
            [self.prompts[order[row % len(order)]] for row in rows],
            temperature=1.0,
            seeds=[derive_seed(seed, row) for row in rows],
            **self.sampling,
        )
        self.samples = self._of_all_processes(samples.to("cpu"), len(own))
        self.drawn_at = step
        self.reference_logits = None

    def _of_all_processes(self, samples: Sequences, count: int) -> Sequences:
        """Return the samples of all processes, of which this process drew the first ``count`` of ``samples``."""
        if processes.world_size() == 1:
            return samples
        columns = samples.input_ids.tolist(), samples.prompt_length.tolist(), samples.length.tolist()
        ids, prompt_length, length = zip(*processes.gather(list(zip(*columns, strict=True))[:count]), strict=True)
        padding = [self.sampling["pad_token_id"]] * max(length)
        padded = [(row[:end] + padding)[: max(length)] for row, end in zip(ids, length, strict=True)]
        return Sequences(torch.tensor(padded), torch.tensor(prompt_length), torch.tensor(length))

    @property
    def held(self) -> Sequences:
        """Return the samples, which are on the host.

        Raises:
            RuntimeError: The buffer was never refreshed.
        """
        if self.samples is None:
            raise RuntimeError("the sample buffer is empty: call refresh() first")
        return self.samples

    def index(self, step: int) -> list[int]:
        """Return the positions of the samples that ``step`` uses, over all processes.

        Consecutive steps walk through the buffer.
        """
        first = self.age(step) * self.batch_size
        return [position % len(self.held) for position in range(first, first + self.batch_size)]

    def rows(self, step: int) -> Sequences:
        """Return the samples that ``step`` uses."""
        return self.held.rows(torch.tensor(self.index(step)))

    def state_dict(self) -> dict[str, Any]:
        """Return the samples and the step of their refresh, for an exact resume."""
        if self.samples is None:
            return {}
        held = self.samples
        return {
            "drawn_at": self.drawn_at,
            "stop_ids": self.stop_ids,
            "input_ids": held.input_ids,
            "prompt_length": held.prompt_length,
            "length": held.length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that :meth:`state_dict` returned, if all samples are there and end in the same tokens.

        The buffer stays empty otherwise, and the next step refreshes it.
        """
        if not state:
            return
        # Version 0.1.0 stopped at one token, the EOS, and did not record it.
        before = state.get("stop_ids", self.stop_ids[:1])
        if before != self.stop_ids:
            log.warning("other tokens end a sample now (%s before, %s now): drawing new samples", before, self.stop_ids)
            return
        # A checkpoint of version 0.1.0 has the samples of the first process alone.
        if len(state["length"]) < self.num_samples:
            log.warning("the checkpoint holds the samples of one process alone: drawing new samples")
            return
        self.drawn_at = state["drawn_at"]
        self.samples = Sequences(state["input_ids"], state["prompt_length"], state["length"]).to("cpu")
