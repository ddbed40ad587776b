"""A batch as policy and reference see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo.ops import Logits, completion_targets, sum_per_sequence, token_logps
from spo.types import ListLogps, PairLogps, PreferenceBatch

if TYPE_CHECKING:
    from spo.losses import Loss


@dataclass(frozen=True)
class ScoredBatch:
    """One forward pass of each model over a batch. Everything else is computed from it on demand, once.

    Attributes:
        batch: ``B`` pairs or lists as ``N`` sequences with ``M`` completion tokens.
        policy: ``(M, V)`` logits of the policy at the completion tokens.
        reference: ``(M, V)`` logits of the reference, or ``None`` if nothing reads them.
        stored_reference: ``(N,)`` summed reference log-probs that need no logits, or ``None``.
    """

    batch: PreferenceBatch
    policy: Logits
    reference: Logits | None = None
    stored_reference: Tensor | None = None

    @cached_property
    def policy_tokens(self) -> Tensor:
        """Return ``(M,)`` log-probs of the completion tokens under the policy, in nats."""
        return token_logps(self.policy, completion_targets(self.batch.sequences))

    @cached_property
    def policy_logps(self) -> Tensor:
        """Return ``(N,)`` log-probs of the completions under the policy, in nats."""
        return sum_per_sequence(self.policy_tokens, self.batch.sequences)

    @cached_property
    def reference_logps(self) -> Tensor | None:
        """Return ``(N,)`` log-probs of the completions under the reference, or ``None`` if it was not asked."""
        if self.reference is None:
            return self.stored_reference
        with torch.no_grad():  # deferred logits compute the head only here
            tokens = token_logps(self.reference, completion_targets(self.batch.sequences))
            return sum_per_sequence(tokens, self.batch.sequences)

    def inputs_of(self, loss: Loss[Any]) -> PairLogps | ListLogps:
        """Return the log-probs in the shape that a loss reads."""
        return loss_inputs(loss, self.batch, self.policy_logps, self.reference_logps)


def loss_inputs(
    loss: Loss[Any], batch: PreferenceBatch, policy_logps: Tensor, reference_logps: Tensor | None
) -> PairLogps | ListLogps:
    """Return ``(N,)`` log-probs of the sequences of a batch in the shape that a loss reads."""
    shaped = batch.list_logps if loss.uses_lists else batch.pair_logps
    return shaped(policy_logps, reference_logps)
