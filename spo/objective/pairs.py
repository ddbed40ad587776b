"""The part of the objective that is taken on the pairs: the method's loss, and a divergence on the same sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spo.objective.base import Divergence, Part, Run, Term
from spo.objective.scored import ScoredBatch
from spo.ops import Logits
from spo.types import ListLogps, PairLogps, PreferenceBatch, Sequences, Window

if TYPE_CHECKING:
    from spo.losses import Loss


class Pairs(Part):
    """The mean loss of the pairs of a window, one term per micro-batch.

    Args:
        run: Run that the part belongs to.
        loss: Loss of the method.
        regularization: Part of the regularizer, which may add a divergence on the pairs.
        needs_reference_logits: Whether that divergence reads the reference's logits. The loss then takes its
            reference log-probs from them too, and the reference is run once.
    """

    def __init__(
        self,
        run: Run,
        loss: Loss[Any],
        regularization: Divergence,
        needs_reference_logits: bool,
    ) -> None:
        self.run, self.loss = run, loss
        self.regularization, self.needs_reference_logits = regularization, needs_reference_logits

    def terms(self, window: Window, step: int) -> Iterator[Term]:
        """Prepare one term per micro-batch, see :meth:`Part.terms`."""
        # Gradients are averaged over processes, so the sum over this process's pairs is multiplied by their number.
        scale = self.run.world_size / window.num_pairs

        def term(batch: PreferenceBatch) -> Tensor:
            total, metrics = self.evaluate(self.score(batch), step)
            self.run.train_metrics.update(metrics)
            return total * scale

        return (partial(term, batch) for batch in window)

    def score(self, batch: PreferenceBatch) -> ScoredBatch:
        """Run the policy on a batch, and the reference where its log-probs are read and not stored."""
        run, sequences = self.run, batch.sequences
        policy = run.speed.logits(run.policy, sequences)
        if self.needs_reference_logits:
            with run.reference.active(run.policy) as model:
                return ScoredBatch(batch, policy, reference=run.speed.logits(model, sequences))
        if self.loss.uses_reference:
            return ScoredBatch(batch, policy, stored_reference=run.reference.pair_logps(batch, run.policy, run.speed))
        return ScoredBatch(batch, policy)

    def evaluate(self, scored: ScoredBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective summed over a batch, and ``(B,)`` of each metric."""
        losses, metrics = self.losses(scored.inputs_of(self.loss), step)
        total = losses.sum()
        divergence = self.regularization.on_pairs(scored)
        if divergence is not None:
            metrics["loss/regularizer"] = divergence
            total = total + self.regularization.weight(step) * divergence.sum()
        return total, metrics

    def losses(self, logps: PairLogps | ListLogps, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each pair or list, ``(B,)``, and the metrics that follow from its log-probs."""
        alpha, beta = self.run.alpha(step), self.run.beta(step)
        losses = self.loss(logps, alpha=alpha, beta=beta)
        return losses, {"loss/preference": losses, **self.loss.metrics(logps, alpha=alpha, beta=beta)}


class PairDivergence(Divergence):
    """A divergence on the responses of the batch, from the forward passes that score the pairs.

    Args:
        run: Run that the part belongs to.
        weight_at: Function from the value of beta to the coefficient.
        divergence: Function of policy logits ``(M, V)``, reference logits ``(M, V)`` and ``N`` sequences to ``(N,)``.
    """

    def __init__(
        self,
        run: Run,
        weight_at: Callable[[float], float],
        divergence: Callable[[Logits, Logits, Sequences], Tensor],
    ) -> None:
        super().__init__(run, weight_at)
        self.divergence = divergence

    def on_pairs(self, scored: ScoredBatch) -> Tensor:
        """Return ``(B,)`` means over the responses of each pair or list."""
        assert scored.reference is not None, "the regularizer declares needs_reference_logits"
        return scored.batch.mean_per_pair(self.divergence(scored.policy, scored.reference, scored.batch.sequences))
