"""Samples of the policy that are drawn now and then and reused in between."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Literal

import torch
from torch import nn

from spo.ops import Logits
from spo.sampling.generate import sample
from spo.seeds import derive_seed
from spo.types import Sequences


class SampleBuffer:
    """Policy samples for a regularizer: refreshed every ``refresh_every`` optimiser steps, served row by row.

    Each rank draws and serves its own share of ``num_samples`` and ``batch_size``. What is drawn depends on the
    seed, the step and the weights alone, so a resumed run draws what the unbroken one would have drawn. The samples
    are held on the host, where cutting rows to their length keeps no device waiting.

    Attributes:
        reference_logits: for each sample, what the reference says of it; not part of the state, as it follows from the
            samples.

    Args:
        prompts: token ids of the prompts to draw from.
        refresh_every: optimiser steps between two drawings.
        num_samples: samples held, over all ranks.
        batch_size: samples served per step, over all ranks.
        max_new_tokens: length limit of a sample.
        eos_token_id: end-of-text.
        pad_token_id: padding.
        sampler: what draws them, see :func:`~spo.sampling.generate.sample`.
        seed: of the run.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        prompts: Seq[Seq[int]],
        *,
        refresh_every: int,
        num_samples: int,
        batch_size: int,
        max_new_tokens: int,
        eos_token_id: int,
        pad_token_id: int,
        sampler: Literal["static", "generate"],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.prompts = prompts
        self.refresh_every = refresh_every
        self.num_samples = max(num_samples // world_size, 1)
        self.batch_size = max(batch_size // world_size, 1)
        self.sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
            "sampler": sampler,
        }
        self.seed, self.rank = seed, rank
        self.drawn_at: int | None = None
        self.samples: Sequences | None = None
        self.reference_logits: list[Logits] | None = None

    def is_stale(self, step: int) -> bool:
        """Whether ``step`` calls for a new drawing."""
        return self.drawn_at is None or step - self.drawn_at >= self.refresh_every

    def age(self, step: int) -> int:
        """Optimiser steps since the samples were drawn."""
        return 0 if self.drawn_at is None else step - self.drawn_at

    def refresh(self, policy: nn.Module, step: int) -> None:
        """Draws ``num_samples`` prompts without replacement (as far as they reach) and a sample for each."""
        seed = derive_seed("global_kl", self.seed, step, self.rank)
        order = torch.randperm(len(self.prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        prompts = [self.prompts[order[i % len(order)]] for i in range(self.num_samples)]
        seeds = [derive_seed(seed, row) for row in range(self.num_samples)]
        self.samples = sample(policy, prompts, temperature=1.0, seeds=seeds, **self.sampling).to("cpu")
        self.drawn_at = step
        self.reference_logits = None

    @property
    def held(self) -> Sequences:
        """The samples, on the host."""
        if self.samples is None:
            raise RuntimeError("the sample buffer is empty: refresh() comes first")
        return self.samples

    def index(self, step: int) -> list[int]:
        """Which of the samples step ``step`` uses; consecutive steps walk through the buffer."""
        first = self.age(step) * self.batch_size
        return [place % len(self.held) for place in range(first, first + self.batch_size)]

    def rows(self, step: int) -> Sequences:
        """Those samples."""
        return self.held.rows(torch.tensor(self.index(step)))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and the step, for an exact resume between two drawings."""
        if self.samples is None:
            return {}
        held = self.samples
        return {
            "drawn_at": self.drawn_at,
            "input_ids": held.input_ids,
            "prompt_length": held.prompt_length,
            "length": held.length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the samples of :meth:`state_dict`."""
        if state:
            self.drawn_at = state["drawn_at"]
            self.samples = Sequences(state["input_ids"], state["prompt_length"], state["length"]).to("cpu")
