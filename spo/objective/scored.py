"""A batch as policy and references see it: the one place where log-probs become the input of a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo.errors import UserError
from spo.losses.rows import numbers_of_shape, one_of_each_row
from spo.objective.learned import buffers_of
from spo.ops import Logits, at_least_float32, by_rows, completion_targets, sum_per_sequence, token_logps
from spo.ops.logps import DeferredLogits
from spo.types import CompletionLogps, Logps, PairLogps, PreferenceBatch

if TYPE_CHECKING:
    from spo.losses import Loss, Term


@dataclass(frozen=True)
class ScoredBatch:
    """One forward pass of each model over a batch. Everything else is computed from it on demand, once.

    Attributes:
        batch: ``B`` pairs or lists as ``N`` sequences with ``M`` completion tokens.
        policy: ``(M, V)`` logits of the policy at the completion tokens.
        reference: ``(M, V)`` logits of the reference, or ``None`` if nothing reads them.
        stored_reference: ``(N,)`` summed reference log-probs that need no logits, or ``None``.
        extra_references: ``(N,)`` summed log-probs under each further reference, by name.
        states: ``(M, H)`` hidden states that the policy's head computes its logits from, or ``None`` if nothing reads
            them.
    """

    batch: PreferenceBatch
    policy: Logits
    reference: Logits | None = None
    stored_reference: Tensor | None = None
    extra_references: Mapping[str, Tensor] = field(default_factory=dict)
    states: Tensor | None = None

    @property
    def policy_states(self) -> Tensor:
        """Return the ``(M, H)`` hidden states from which the policy predicts the completion tokens, in its dtype.

        Raises:
            UserError: The states were not kept, because no term declares that it reads them.
        """
        if self.states is None:
            raise UserError(
                "method.loss: a term reads hidden states of the policy, but does not declare it: write "
                "Term(compute, needs_policy_states=True)"
            )
        return self.states

    @property
    def prompt_states(self) -> Tensor:
        """Return the ``(N, H)`` hidden state of the policy at the last token of the prompt of each sequence."""
        lengths = self.batch.sequences.completion_length
        return self.policy_states[lengths.cumsum(0) - lengths]

    @cached_property
    def policy_tokens(self) -> Tensor:
        """Return ``(M,)`` log-probs of the completion tokens under the policy, in nats."""
        return token_logps(self.policy, completion_targets(self.batch.sequences))

    @cached_property
    def policy_log_sum_squares(self) -> Tensor:
        """Return ``(M,)`` logarithms of the sum over the vocabulary of squared probabilities under the policy."""
        return by_rows(lambda logits: (2 * at_least_float32(logits).log_softmax(-1)).logsumexp(-1), self.policy)

    @cached_property
    def reference_tokens(self) -> Tensor:
        """Return ``(M,)`` log-probs of the completion tokens under the reference, in nats, without gradient.

        Raises:
            UserError: The reference's logits were not computed, because no term declares that it reads them.
        """
        if self.reference is None:
            raise UserError(
                "method.loss: a term reads the tokens of the reference, but does not declare it: write "
                "Term(compute, needs_reference_logits=True)"
            )
        with torch.no_grad():  # deferred logits compute the head only here
            return token_logps(self.reference, completion_targets(self.batch.sequences))

    @cached_property
    def policy_logps(self) -> Tensor:
        """Return ``(N,)`` log-probs of the completions under the policy, in nats."""
        return sum_per_sequence(self.policy_tokens, self.batch.sequences)

    @cached_property
    def reference_logps(self) -> Tensor | None:
        """Return ``(N,)`` log-probs of the completions under the reference, or ``None`` if it was not asked."""
        if self.reference is None:
            return self.stored_reference
        return sum_per_sequence(self.reference_tokens, self.batch.sequences)

    def per_completion(self, tokens: Tensor) -> Tensor:
        """Return the sums of ``(M,)`` numbers over the tokens of each completion, ``(n, B)``, best first."""
        return self.batch.per_completion(sum_per_sequence(tokens, self.batch.sequences))

    def mean_per_completion(self, tokens: Tensor) -> Tensor:
        """Return the means of ``(M,)`` numbers over the tokens of each completion, ``(n, B)``, best first."""
        return self.per_completion(tokens) / self.lengths.clamp(min=1)

    @cached_property
    def lengths(self) -> Tensor:
        """Return the ``(n, B)`` number of tokens of each completion, 0 for a missing one."""
        return self.batch.per_completion(self.batch.sequences.completion_length)

    def common_prefix(self, tokens: Tensor) -> Tensor:
        """Return sums of ``(M,)`` numbers over as many first tokens as the shortest completion of the row has.

        Returns:
            ``(n, B)``, best first.
        """
        sequences, mask = self.batch.sequences, self.batch.mask()
        shortest = self.lengths.masked_fill(~mask, torch.iinfo(torch.long).max).amin(0)
        # Not differences of running sums over all tokens: one of them may be infinite, or too large to add others to.
        rows = torch.zeros_like(sequences.input_ids, dtype=tokens.dtype).flatten()
        rows = rows.index_copy(0, sequences.left_aligned_index, tokens).view_as(sequences.input_ids)
        of_completions = rows[self.batch.per_completion(torch.arange(len(rows), device=rows.device))]
        inside = torch.arange(rows.shape[1], device=rows.device) < shortest[:, None]
        return of_completions.masked_fill(~(inside & mask[..., None]), 0).sum(-1)

    def inputs_of(self, loss: Loss[Any]) -> Logps:
        """Return what a loss reads of the batch.

        Raises:
            UserError: A term has another shape than ``(n, B)``, or uses logits that do not exist.
        """
        logps = loss_inputs(loss, self.batch, self.policy_logps, self.reference_logps, self.extra_references)
        if not loss.terms:
            return logps
        terms = {name: self._computed(name, term) for name, term in loss.terms.items()}
        shape = tuple(self.batch.mask().shape)
        for name, value in terms.items():
            what = f"method.loss: the term {name!r} must return a number of each completion"
            value = numbers_of_shape(value, shape, what, "sum over tokens with scored.per_completion")
            # A term may be a count, or come from a half-precision layer. Labels must not round to its precision.
            terms[name] = value.to(torch.promote_types(value.dtype, self.policy_logps.dtype))
        return replace(logps, terms={name: loss.inputs.arrange(value) for name, value in terms.items()})

    def _computed(self, name: str, term: Term) -> Tensor:
        """Return a term. Its author may have tried it only where all logits exist."""
        try:
            return term.compute(self)
        except (AttributeError, TypeError) as error:
            if self.reference is not None and not isinstance(self.policy, DeferredLogits):
                raise
            raise UserError(
                f"method.loss: the term {name!r} fails ({error}): give logits to spo.ops.by_rows, and write "
                "Term(compute, needs_reference_logits=True) if it reads the reference"
            ) from error


def loss_inputs(
    loss: Loss[Any],
    batch: PreferenceBatch,
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    extra_references: Mapping[str, Tensor] | None = None,
) -> Logps:
    """Return what a loss without terms reads of a batch.

    Args:
        loss: Loss of the method.
        batch: Batch of ``N`` sequences.
        policy_logps: ``(N,)`` summed log-probs of the sequences under the policy.
        reference_logps: ``(N,)`` summed log-probs of the sequences under the reference, or ``None``.
        extra_references: ``(N,)`` summed log-probs of the sequences under each further reference, by name.
    """
    arrange, lengths = loss.inputs.arrange, batch.sequences.completion_length
    if not loss.uses_reference:
        reference_logps = None  # A regularizer may have them computed, which the loss must not depend on.
    extra = {}
    for name, role in loss.extra_completions.items():
        place = batch.extra[name]
        policy = policy_logps[place]
        extra[name] = CompletionLogps(
            policy if role.gradient else policy.detach(),
            lengths[place],
            None if reference_logps is None else reference_logps[place],
        )
    references = {name: arrange(batch.per_completion(logps)) for name, logps in (extra_references or {}).items()}
    logps = loss.inputs.of_batch(batch, policy_logps, reference_logps)
    features = dict(batch.features)
    if loss.inputs is PairLogps:
        # A loss that learns from the best completion alone may read lists of more than two.
        features |= {name: features[name][:, :2] for name in loss.per_completion_features}
    return replace(logps, references=references, features=features, extra=extra)


def losses_of(loss: Loss[Any], logps: Logps, alpha: float, beta: float) -> Tensor:
    """Return the ``(B,)`` losses.

    Args:
        loss: Loss of the method.
        logps: Log-probs of ``B`` pairs, lists or labelled completions.
        alpha: Softness.
        beta: Temperature of the method.

    Raises:
        UserError: The loss returns another shape, such as that of a mean.
    """
    with _unchanged(loss, logps):
        return one_of_each_row(loss, loss(logps, alpha=alpha, beta=beta), logps)


def metrics_of(loss: Loss[Any], logps: Logps, alpha: float, beta: float) -> dict[str, Tensor]:
    """Return ``(B,)`` of each metric that a loss computes.

    Args:
        loss: Loss of the method.
        logps: Log-probs of ``B`` pairs, lists or labelled completions.
        alpha: Softness.
        beta: Temperature of the method.

    Raises:
        UserError: The loss returns a metric that it does not declare, or one of another shape.
    """
    with _unchanged(loss, logps):
        found = loss.metrics(logps, alpha=alpha, beta=beta)
    if not isinstance(found, Mapping):
        raise UserError(
            f"method.loss: {type(loss).__name__}.metrics must return a dictionary, and returns {type(found).__name__}"
        )
    if undeclared := sorted(found.keys() - set(loss.metric_names)):
        raise UserError(
            f"method.loss: {type(loss).__name__}.metrics returns {undeclared[0]!r}, which the loss does not declare: "
            f"add it to extra_metrics = {(*loss.extra_metrics, undeclared[0])}"
        )
    what = f"method.loss: {type(loss).__name__}.metrics must return one number of each row as"
    remedy = "a mean over the batch would count wrongly"
    return {name: numbers_of_shape(values, (len(logps),), f"{what} {name!r}", remedy) for name, values in found.items()}


@contextmanager
def _unchanged(loss: Loss[Any], logps: Logps) -> Iterator[None]:
    """Make a context in which a loss must change neither its input, which its metrics read too, nor its buffers.

    Soft labels call it twice, and a validation calls it too.

    Raises:
        UserError: A number of the input was changed in place, or a buffer was changed.
    """
    inputs = [(path, value, _version(value)) for path, value in logps.columns().items()]
    buffers = [(name, value, _version(value)) for name, value in buffers_of(loss).items()]
    yield
    for path, value, version in inputs:
        if _version(value) != version:
            raise UserError(
                f"method.loss: {type(loss).__name__} changes its input {path} in place, which its metrics read too: "
                "compute a new tensor instead"
            )
    after = buffers_of(loss)
    for name, value, version in buffers:
        if after.get(name) is not value or _version(value) != version:
            raise UserError(
                f"method.loss: {type(loss).__name__} changes its buffer {name} while it computes, so soft labels and "
                "validations would change it too: change it in update_statistics"
            )


def _version(tensor: Tensor) -> int:
    """Return a number that a change in place raises; of a tensor made in inference mode, which does not count, 0."""
    return 0 if tensor.is_inference() else tensor._version
