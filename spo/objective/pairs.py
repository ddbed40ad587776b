"""The part of the objective that is taken on the pairs: the method's loss, and a divergence on the same sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo.errors import UserError
from spo.objective.base import Divergence, Part, Run, StepTerm
from spo.objective.joint import concat_logps, gather_logps, leaves_of
from spo.objective.learned import parameters_of, update_statistics
from spo.objective.scored import ScoredBatch, losses_of, metrics_of
from spo.ops import Logits
from spo.types import Logps, PreferenceBatch, Sequences, Window

if TYPE_CHECKING:
    from spo.forward.speed import Speed
    from spo.losses import Loss
    from spo.models.reference import Reference


IMPOSSIBLE_LOGP = -1e8
"""Log-prob in nats that only a completion with a masked token has, or one under a policy that has diverged."""
MASKED_LOGP = -1e30
"""Log-prob in nats of a completion with a token whose logit is -inf, or as low as a dtype allows."""


@dataclass(frozen=True)
class PairScores:
    """Numbers of a batch that show which pairs made a loss infinite or undefined. They stay on the device.

    Attributes:
        index: ``(B,)`` position of each pair in its split.
        losses: ``(B,)`` loss of each pair, with the regularizer on it.
        policy: ``(n, B)`` log-probs under the policy.
        reference: ``(n, B)`` log-probs under the reference, or ``None`` if the loss does not read them.
    """

    index: Tensor
    losses: Tensor
    policy: Tensor
    reference: Tensor | None


def impossible(policy: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``(B,)`` whether a model masks a token of a pair, and whether the policy is as far from it.

    The reference does not move, so that a low log-prob shows a mask. A policy may have diverged instead.

    Args:
        policy: ``(n, B)`` log-probs under the policy.
        reference: ``(n, B)`` log-probs under the reference, or ``None``.
    """
    masked = (policy <= MASKED_LOGP).any(0)
    if reference is not None:
        masked = masked | (reference <= IMPOSSIBLE_LOGP).any(0)
    return masked, (policy <= IMPOSSIBLE_LOGP).any(0)


@dataclass(frozen=True)
class Joint:
    """Numbers that a micro-batch needs from a loss that was called with all pairs of a step.

    Attributes:
        slopes: Derivative of the sum of all losses by each number of the policy in the micro-batch, by its path.
        metrics: ``(B,)`` values of each metric.
        parameters: Derivative of the sum of all losses by each parameter of the loss; empty but in one micro-batch.
    """

    slopes: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor]
    parameters: Sequence[tuple[nn.Parameter, Tensor]] = field(default_factory=list)


def score(
    batch: PreferenceBatch,
    loss: Loss[Any],
    policy: nn.Module,
    reference: Reference,
    speed: Speed,
    extra_references: Mapping[str, Reference],
    needs_reference_logits: bool = False,
) -> ScoredBatch:
    """Run the policy on a batch, and the references as far as the loss reads them.

    Args:
        batch: Batch of pairs, lists or labelled completions.
        loss: Loss of the method.
        policy: Model in training.
        reference: Source of reference log-probs.
        speed: Speed settings, resolved for the models.
        extra_references: Further references that the loss declares, by name.
        needs_reference_logits: Whether something beside the loss reads the reference's logits.
    """
    states = None
    if loss.needs_policy_states:
        logits, states = speed.logits_and_states(policy, batch.sequences)
    else:
        logits = speed.logits(policy, batch.sequences)
    others = {name: extra_references[name].pair_logps(batch, policy, speed) for name in loss.extra_references}
    if needs_reference_logits or loss.needs_reference_logits:
        with reference.active(policy) as model:
            of_reference = speed.logits(model, batch.sequences)
        return ScoredBatch(batch, logits, of_reference, extra_references=others, states=states)
    stored = batch.reference_logps if loss.uses_reference else None  # of the main reference alone
    if stored is None and loss.uses_reference:
        stored = reference.pair_logps(batch, policy, speed)
    return ScoredBatch(batch, logits, stored_reference=stored, extra_references=others, states=states)


class Pairs(Part):
    """The mean loss of the pairs of a window, one term per micro-batch.

    A loss that declares ``full_batch`` or has statistics is called once with all pairs of the window, on all processes,
    and its slopes are then carried into each micro-batch. With several micro-batches this takes a second forward pass
    of each. A validation calls a loss with ``full_batch`` with all pairs of the split.

    Args:
        run: Run that the part belongs to.
        loss: Loss of the method.
        regularization: Part of the regularizer, which may add a divergence on the pairs.
        needs_reference_logits: Whether that divergence reads the reference's logits. The loss then takes its
            reference log-probs from them too, and the reference is run once.

    Attributes:
        scores: Scores of the batches of the current step or validation.
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
        self.needs_whole_step = loss.full_batch or loss.has_statistics
        self.validated: list[Logps] = []
        self.scores: list[PairScores] = []
        self._is_impossible: list[tuple[Tensor, Tensor, Tensor]] = []

    def terms(self, window: Window, step: int) -> Iterator[StepTerm]:
        """Prepare one term per micro-batch, see :meth:`Part.terms`."""
        # Gradients are averaged over processes, so the sum over this process's pairs is multiplied by their number.
        scale = self.run.world_size / window.num_pairs
        self.scores = []
        joint = self._score_ahead(window, step)

        def term(batch: PreferenceBatch, known: Joint | None) -> Tensor:
            scored = self.score(batch)
            if known is None and self.needs_whole_step:
                [known] = self.joint([scored.inputs_of(self.loss)], step)
            total, metrics = self.evaluate(scored, step, known)
            self._check_gradient(total)
            self.run.train_metrics.update(metrics)
            return total * scale

        return (partial(term, batch, known) for batch, known in zip(window, joint, strict=True))

    def _score_ahead(self, window: Window, step: int) -> Sequence[Joint | None]:
        """Return what a loss of all pairs of the step needs to know before the first of several micro-batches."""
        batches, run = window.micro_batches, self.run
        if len(batches) == 1 or not self.needs_whole_step:
            return [None] * len(batches)
        # Dropout draws the same numbers again in the passes with gradient.
        with torch.no_grad(), torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
            inputs = [self.score(batch).inputs_of(self.loss) for batch in batches]
        return self.joint(inputs, step)

    def joint(self, inputs: Sequence[Logps], step: int) -> list[Joint]:
        """Call the loss once with all pairs of a step, over micro-batches and processes.

        Args:
            inputs: Log-probs of each micro-batch of this process.
            step: Optimizer steps taken so far.

        Returns:
            Slopes and metrics of each micro-batch.
        """
        parts, leaves = zip(*map(leaves_of, inputs), strict=True)
        parameters = parameters_of(self.loss)
        with torch.enable_grad():
            whole, own = self._gathered(parts)
            if self.loss.has_statistics:
                update_statistics(self.loss, whole)
            losses, metrics = self.losses(whole, step)
            self._check_gradient(losses)
            wanted = [*(leaf for of_part in leaves for leaf in of_part.values()), *parameters]
            slopes = iter(torch.autograd.grad(losses.sum(), wanted, allow_unused=True))
        sizes = list(map(len, inputs))
        split = {name: values[own].detach().split(sizes) for name, values in metrics.items()}
        found = [
            Joint(
                {path: slope for path in of_part if (slope := next(slopes)) is not None},
                {name: of_parts[i] for name, of_parts in split.items()},
            )
            for i, of_part in enumerate(leaves)
        ]
        of_loss = [(p, slope) for p in parameters if (slope := next(slopes)) is not None]
        return [replace(found[0], parameters=of_loss), *found[1:]]

    def _check_gradient(self, losses: Tensor) -> None:
        if not losses.requires_grad:
            raise UserError(
                f"method.loss: {type(self.loss).__name__} returns numbers without a gradient, so nothing would be "
                "trained: compute them from log-probs of the policy, without detach() or comparisons"
            )

    def score(self, batch: PreferenceBatch) -> ScoredBatch:
        """Run the policy on a batch, and the reference where its log-probs are read and not stored."""
        run = self.run
        scored = score(
            batch,
            self.loss,
            run.policy,
            run.reference,
            run.speed,
            run.extra_references,
            self.needs_reference_logits,
        )
        policy = batch.per_completion(scored.policy_logps)
        reference = None if scored.reference_logps is None else batch.per_completion(scored.reference_logps)
        self._is_impossible.append((batch.index, *impossible(policy, reference)))
        return scored

    def take_impossible(self) -> tuple[list[int], list[int]]:
        """Return the positions of pairs scored since the last call of which a completion has the probability zero.

        Their losses are infinite or undefined. This waits for the device, as a step does not.

        Returns:
            Pairs of which a model masks a token, and pairs that are as unlikely under the policy.
        """
        seen, self._is_impossible = self._is_impossible, []
        masked = {row for index, found, _ in seen for row in index[found].tolist()}
        return sorted(masked), sorted({row for index, _, found in seen for row in index[found].tolist()} - masked)

    def evaluate(self, scored: ScoredBatch, step: int, joint: Joint | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective summed over a batch, and ``(B,)`` of each metric.

        Args:
            scored: Batch as the models see it.
            step: Optimizer steps taken so far.
            joint: Slopes and metrics of the batch, if its losses depend on other batches.
        """
        if joint is None and len(scored.batch) == 0:
            # A process without a pair only takes part in the passes. Losses may rely on at least one row.
            return scored.policy_logps[:0].sum(), {}
        if joint is None:
            losses, metrics = self.losses(scored.inputs_of(self.loss), step)
            total = losses.sum()
        else:
            metrics = dict(joint.metrics)
            numbers = scored.inputs_of(self.loss).columns()
            changes = [(numbers[path] * slope).sum() for path, slope in joint.slopes.items()]
            # Every process computes the whole derivative by the loss's parameters, and the step adds all processes up.
            changes += [(p * slope).sum() / self.run.world_size for p, slope in joint.parameters]
            change = torch.stack(changes).sum()
            total = metrics["loss/preference"].sum() + (change - change.detach())
        each = metrics["loss/preference"]
        divergence = self.regularization.on_pairs(scored)
        if divergence is not None:
            metrics["loss/regularizer"] = divergence
            weight = self.regularization.weight(step)
            total, each = total + weight * divergence.sum(), each + weight * divergence
        self._keep_scores(scored, each)
        return total, metrics

    def _keep_scores(self, scored: ScoredBatch, losses: Tensor) -> None:
        batch, reference = scored.batch, scored.reference_logps
        self.scores.append(
            PairScores(
                batch.index,
                losses.detach(),
                batch.per_completion(scored.policy_logps.detach()),
                None if reference is None else batch.per_completion(reference),
            )
        )

    def validate(self, scored: ScoredBatch, step: int) -> dict[str, Tensor]:
        """Return ``(B,)`` of each metric of a batch that is known before the other batches of the split."""
        if not self.loss.full_batch:
            return self.evaluate(scored, step)[1]
        self.validated.append(scored.inputs_of(self.loss))
        divergence = self.regularization.on_pairs(scored)
        # The losses of these pairs are known only when the split ends.
        self._keep_scores(scored, scored.policy_logps.new_zeros(len(scored.batch)))
        return {} if divergence is None else {"loss/regularizer": divergence}

    def finish_validation(self, step: int) -> dict[str, Tensor]:
        """Return the metrics of this process's pairs that depend on all pairs of the split, if there are any."""
        parts, self.validated = self.validated, []
        if not parts:
            return {}
        whole, own = self._gathered(parts)
        losses, metrics = self.losses(whole, step)
        sizes = [len(one.index) for one in self.scores]
        parts_of = zip(self.scores, losses[own].detach().split(sizes), strict=True)
        self.scores = [replace(one, losses=of_batch) for one, of_batch in parts_of]
        return {name: values[own] for name, values in metrics.items()}

    def _gathered(self, parts: Sequence[Logps]) -> tuple[Logps, slice]:
        """Return the rows of all batches and processes, and which of them are those of this process."""
        names = self.loss.per_completion_features
        return gather_logps(concat_logps(parts, names), self.run.global_rank, self.run.world_size, names)

    def losses(self, logps: Logps, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each pair or list, ``(B,)``, and the metrics that follow from its log-probs."""
        alpha, beta = self.run.alpha(step), self.run.beta(step)
        # Layers of a loss would compute in half precision under bf16-mixed, and not in an evaluation.
        with torch.autocast(self.run.device.type, enabled=False):
            losses = losses_of(self.loss, logps, alpha, beta)
            return losses, {"loss/preference": losses, **metrics_of(self.loss, logps, alpha, beta)}


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
