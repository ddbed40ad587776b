"""The buffer of policy samples, drawn from time to time and reused in between."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from typing import Any, Literal

import torch
from torch import nn

from spo.ops import Logits
from spo.sampling.generate import sample
from spo.seeds import derive_seed
from spo.types import Sequences

log = logging.getLogger(__name__)


class SampleBuffer:
    """Policy samples for a regularizer, refreshed every ``refresh_every`` optimizer steps.

    Each rank draws and serves its own share of ``num_samples`` and ``batch_size``. The samples depend on the seed, the
    step and the weights alone, so a resumed run draws what the uninterrupted one would have drawn. They stay on the
    host, where cutting rows to their length does not wait for the device.

    Attributes:
        reference_logits: Logits of the reference for each sample, or ``None``. The state leaves them out, because they
            follow from the samples.

    Args:
        prompts: Token ids of the prompts to draw from.
        refresh_every: Optimizer steps between two refreshes.
        num_samples: Number of samples in the buffer, over all ranks.
        batch_size: Number of samples per step, over all ranks.
        max_new_tokens: Length limit of a sample in tokens.
        stop_ids: Tokens that end a sample.
        pad_token_id: Token id of padding.
        sampler: Sampler to use, see :func:`~spo.sampling.generate.sample`.
        seed: Seed of the run.
        rank: Rank of this process.
        world_size: Number of processes.
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
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.prompts = prompts
        self.refresh_every = refresh_every
        self.num_samples = max(num_samples // world_size, 1)
        self.batch_size = max(batch_size // world_size, 1)
        self.stop_ids = list(stop_ids)
        self.sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "stop_ids": self.stop_ids,
            "pad_token_id": pad_token_id,
            "sampler": sampler,
        }
        self.seed, self.rank = seed, rank
        self.drawn_at: int | None = None
        self.samples: Sequences | None = None
        self.reference_logits: list[Logits] | None = None

    def is_stale(self, step: int) -> bool:
        """Return whether the buffer has to be refreshed at ``step``."""
        return self.drawn_at is None or step - self.drawn_at >= self.refresh_every

    def age(self, step: int) -> int:
        """Return the number of optimizer steps since the samples were drawn."""
        return 0 if self.drawn_at is None else step - self.drawn_at

    def refresh(self, policy: nn.Module, step: int) -> None:
        """Draw ``num_samples`` prompts and a sample for each.

        Prompts are drawn without replacement; only if there are fewer than ``num_samples``, they repeat.

        Args:
            policy: Model to draw from.
            step: Optimizer step, on which the seed depends.
        """
        seed = derive_seed("global_kl", self.seed, step, self.rank)
        order = torch.randperm(len(self.prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        prompts = [self.prompts[order[i % len(order)]] for i in range(self.num_samples)]
        seeds = [derive_seed(seed, row) for row in range(self.num_samples)]
        self.samples = sample(policy, prompts, temperature=1.0, seeds=seeds, **self.sampling).to("cpu")
        self.drawn_at = step
        self.reference_logits = None

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
        """Return the positions of the samples that ``step`` uses; consecutive steps walk through the buffer."""
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
        """Restore a state that :meth:`state_dict` returned, unless its samples end in other tokens.

        The buffer stays empty then, and the next step refreshes it.
        """
        if not state:
            return
        # Version 0.1.0 stopped at one token, the EOS, and did not record it.
        before = state.get("stop_ids", self.stop_ids[:1])
        if before != self.stop_ids:
            log.warning("other tokens end a sample now (%s before, %s now): drawing new samples", before, self.stop_ids)
            return
        self.drawn_at = state["drawn_at"]
        self.samples = Sequences(state["input_ids"], state["prompt_length"], state["length"]).to("cpu")
