"""The interface of a part of the objective, and of the run that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from spo.types import Window

if TYPE_CHECKING:
    from spo.forward.speed import Speed
    from spo.metrics.sums import SumsAndCounts
    from spo.metrics.trained import Trained
    from spo.models.reference import Reference
    from spo.objective.enumerated import Enumeration
    from spo.objective.scored import ScoredBatch
    from spo.schedules import Schedule

StepTerm = Callable[[], Tensor]
"""Compute a differentiable scalar. The step differentiates the terms one after the other and adds the gradients up."""


@dataclass(frozen=True)
class Prompts:
    """Prompts that the policy is sampled from during training.

    Attributes:
        train: Token ids of the prompts of the training split.
        selection: Token ids of the prompts of the selection split.
        stop_ids: Tokens that end a completion.
        pad_token_id: Token that fills rows up.
        regularizer: Token ids of the prompts that the regularizer samples for; empty for those of the training split.
    """

    train: Sequence[Sequence[int]]
    selection: Sequence[Sequence[int]]
    stop_ids: Sequence[int]
    pad_token_id: int
    regularizer: Sequence[Sequence[int]] = ()


class Run(Protocol):
    """The run that a part belongs to. The alignment module is one.

    Parts read these attributes when they need them, since some change: ``speed`` is resolved, and ``device`` is known,
    only when training starts.

    Attributes:
        policy: Model in training.
        reference: Source of reference log-probabilities.
        extra_references: Further references that the loss declares, by name.
        speed: Switches of how models are run.
        alpha: Schedule of the softness.
        beta: Schedule of the method's temperature, or of the regularizer's weight.
        prompts: Prompts to sample from.
        enumeration: Every response to every prompt, or ``None`` if the data set cannot be enumerated.
        micro_batch_size: Most pairs per forward pass, or ``None`` for no limit.
        micro_batch_tokens: Most tokens per forward pass, or ``None`` for no limit.
        seed: Random seed of the run.
        train_metrics: Accumulator of what a step measures.
        trained: Steps, pairs and sampled tokens so far.
    """

    policy: nn.Module
    reference: Reference
    extra_references: Mapping[str, Reference]
    speed: Speed
    alpha: Schedule
    beta: Schedule
    prompts: Prompts
    enumeration: Enumeration | None
    micro_batch_size: int | None
    micro_batch_tokens: int | None
    seed: int
    train_metrics: SumsAndCounts
    trained: Trained

    @property
    def device(self) -> torch.device:
        """Return the device of the policy."""

    @property
    def global_rank(self) -> int:
        """Return the index of this process."""

    @property
    def world_size(self) -> int:
        """Return the number of processes."""


class Part:
    """A part of the objective. A step minimizes the sum of the terms of all parts, averaged over processes."""

    def terms(self, window: Window, step: int) -> Iterable[StepTerm]:
        """Prepare the terms of one optimizer step.

        Work that comes before any forward pass with gradient, such as drawing samples, is done here and not in a term.

        Args:
            window: Pairs of the step.
            step: Optimizer steps taken so far.
        """
        return ()

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


class Divergence(Part):
    """The part ``weight * R`` that a regularizer adds; this base adds nothing.

    R has one home: its own sequences (:meth:`terms`), or the sequences of the pairs (:meth:`on_pairs`), which then
    shares their forward passes.

    Args:
        run: Run that the part belongs to.
        weight_at: Function from the value of beta to the coefficient of R.
    """

    def __init__(self, run: Run, weight_at: Callable[[float], float]) -> None:
        self.run, self.weight_at = run, weight_at

    def weight(self, step: int) -> float:
        """Return the coefficient of R at an optimizer step."""
        return self.weight_at(self.run.beta(step))

    def on_pairs(self, scored: ScoredBatch) -> Tensor | None:
        """Return ``(B,)`` R on the responses of each pair or list, or ``None`` if R is not taken on them."""
        return None

    def validation_value(self, means: Mapping[str, float]) -> float | None:
        """Return R at a validation, or ``None`` if it is unknown or already among ``means``.

        Args:
            means: Metrics of this validation, those of the probe included.
        """
        return None
