"""The part of the objective that is taken on every response, for data sets that can be enumerated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo.objective.base import Divergence, Run, StepTerm
from spo.types import Sequences, Window

if TYPE_CHECKING:
    from spo.forward.speed import Speed


@dataclass(frozen=True)
class Enumeration:
    """Every response to each of ``num_prompts`` prompts.

    Attributes:
        sequences: Responses with their prompts, all of the first prompt first, equally many for each.
        num_prompts: Number of prompts.
    """

    sequences: Sequences
    num_prompts: int


class EnumeratedDivergence(Divergence):
    """A divergence that is a sum over every response.

    Args:
        run: Run that the part belongs to.
        weight_at: Function from the value of beta to the coefficient.
        divergence: Function of ``(P, R)`` policy and ``(P, R)`` reference log-probs, of ``R`` responses to each of
            ``P`` prompts, to ``(P,)``.
        enumeration: Every response to every prompt.
    """

    def __init__(
        self,
        run: Run,
        weight_at: Callable[[float], float],
        divergence: Callable[[Tensor, Tensor], Tensor],
        enumeration: Enumeration,
    ) -> None:
        super().__init__(run, weight_at)
        self.divergence, self.enumeration = divergence, enumeration
        self._layout: Speed | None = None
        self._arranged = enumeration.sequences

    def terms(self, window: Window, step: int) -> Iterator[StepTerm]:
        """Prepare the one term, a mean over prompts."""

        def term() -> Tensor:
            divergence = self.measure()
            if self.run.global_rank == 0:  # All processes have the same responses.
                self.run.train_metrics.update({"loss/regularizer": divergence})
            return self.weight(step) * divergence.mean()

        yield term

    @torch.no_grad()
    def validation_value(self, means: Mapping[str, float]) -> float:
        """Return the divergence of the policy as it is."""
        return float(self.measure().mean())

    def measure(self) -> Tensor:
        """Return ``(P,)`` the divergence for each prompt, with gradient."""
        run, sequences = self.run, self._sequences().to(self.run.device)
        policy = run.speed.logps(run.policy, sequences)
        with run.reference.active(run.policy) as model:
            reference = run.speed.logps(model, sequences)
        shape = (self.enumeration.num_prompts, -1)
        return self.divergence(policy.view(shape), reference.view(shape))

    def _sequences(self) -> Sequences:
        # The layout is resolved when training starts; packing anew at every step would take longer than the forward.
        if self._layout != self.run.speed:
            self._layout = self.run.speed
            self._arranged = self._layout.arrange(self.enumeration.sequences)
        return self._arranged
