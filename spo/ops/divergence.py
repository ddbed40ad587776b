"""Entropy of next-token distributions, and estimators of KL(policy || reference) of sequences.

An estimator maps the logits of sequences drawn from the policy to one number per sequence. The expectation of its
value and that of its autograd gradient are separate questions: differentiating an unbiased estimate of the KL does not,
in general, estimate the gradient of the KL, because the sequences depend on the policy too (arXiv:2506.09477).
``docs/explanation/kl-estimators.md`` compares the estimators, with variances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spo.ops.logps import Logits, at_least_float32, by_rows, completion_targets, in_cache, sum_per_sequence, token_logps
from spo.types import Sequences


def token_kl(policy_logits: Logits, reference_logits: Logits) -> Tensor:
    """Compute KL(policy || reference) of the next-token distribution at each position.

    Args:
        policy_logits: ``(M, V)`` logits of the policy.
        reference_logits: ``(M, V)`` logits of the reference; they do not get a gradient.

    Returns:
        ``(M,)`` nats, non-negative up to rounding. A token of probability zero under the policy, such as one whose
        logit is -inf, counts as zero in value and gradient. A token of probability zero under the reference alone
        makes the value of its position infinite and the gradient of that position zero.
    """
    return by_rows(_TokenKL.apply, policy_logits, reference_logits)


def token_entropy(logits: Logits) -> Tensor:
    """Return the ``(M,)`` entropy in nats of each next-token distribution given by ``(M, V)`` logits.

    A token of probability zero counts as zero in value and gradient.
    """
    return -by_rows(_TokenKL.apply, logits)


class _TokenKL(torch.autograd.Function):
    """The divergence, and its gradient p * (log p - log q) - p * KL from the same passes over the logits.

    Without a reference, log q is 0, and the value is the negative entropy.
    """

    @staticmethod
    def forward(ctx: Any, policy: Tensor, reference: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(policy.dtype, torch.float32)
        slope = torch.empty_like(policy, dtype=wide) if ctx.needs_input_grad[0] else None
        values = []
        for rows in in_cache(*(tensor for tensor in (policy, reference, slope) if tensor is not None)):
            log_p = at_least_float32(rows[0]).log_softmax(-1)
            log_q = None if reference is None else at_least_float32(rows[1]).log_softmax(-1)
            probability = log_p.exp()
            # In a row with NaN among its logits, all log-probs are NaN.
            is_nan = (probability[:, 0] if log_q is None else probability[:, 0] + log_q[:, 0]).isnan()
            # Not a dot product: autocast would compute it in half precision. A term whose probability is 0 may be NaN.
            terms = (log_p if log_q is None else log_p.sub_(log_q)).mul_(probability)
            divergence = terms.nansum(-1).masked_fill_(is_nan, torch.nan)
            values.append(divergence)
            if slope is not None:
                torch.addcmul(terms, probability, divergence[:, None], value=-1, out=rows[-1])
                rows[-1].nan_to_num_(0, 0, 0)  # No slope is finite in a row whose divergence is infinite.
        ctx.save_for_backward(slope)
        ctx.dtype = policy.dtype
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return (slope * gradient[:, None]).to(ctx.dtype), None


def entropy(logps: Tensor) -> Tensor:
    """Return the entropy in nats over the last dimension, from log-probabilities; a probability of 0 counts as 0."""
    probability = logps.exp()
    # Without the mask, 0 * -inf would be NaN in value and gradient.
    return -(probability * logps.masked_fill(probability == 0, 0)).sum(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) in nats over the last dimension, from log-probabilities.

    Where p is zero, a term counts as zero. Where q alone is zero, the value is infinite and its gradient is zero.
    """
    probability = p.exp()
    ratio = (p - q).masked_fill(probability == 0, 0)
    infinite = ratio == torch.inf
    finite = (probability * ratio.masked_fill(infinite, 0)).sum(-1)
    return finite.masked_fill(infinite.any(-1), torch.inf)


# --- estimators of the sequence KL --------------------------------------------------------------------------------
#
# Each takes (M, V) logits of the policy, (M, V) logits of the reference and the N sequences, and returns (N,) nats.


def tokenwise_kl(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    """Sum the KL between the next-token distributions over positions, as SPO does (arXiv:2405.00747).

    By the chain rule the value is unbiased, and it is never negative. The gradient goes through the conditional
    distributions and treats the prefixes as fixed: it has low variance, and lacks the term that :func:`unbiased_kl`
    adds.
    """
    return sum_per_sequence(token_kl(policy_logits, reference_logits), sequences)


def unbiased_kl(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    r"""Compute the value of :func:`tokenwise_kl` with a gradient whose expectation is that of the KL.

    A token decides which prefixes follow it. This dependence adds its score times the later divergence:

    .. math:: \sum_t \nabla \log \pi(y_t|x, y_{<t}) \Big( \sum_{s>t} KL_s - b_t \Big)

    where the baseline b_t is the mean of the later divergence over the *other* sequences of the batch that reach
    position t, or 0 without such sequences. It is independent of y_t, so the gradient is unbiased for batches of any
    size, as long as the sequences are independent draws given their prompts.
    """
    per_token = token_kl(policy_logits, reference_logits)
    logps = token_logps(policy_logits, completion_targets(sequences))
    later = per_token.detach().masked_fill(per_token == torch.inf, 0)  # An infinite divergence gives no direction.
    score = sum_per_sequence(logps * _later_minus_baseline(later, sequences), sequences)
    # The score has the value 0 here, and only its gradient counts.
    return sum_per_sequence(per_token, sequences) + (score - score.detach())


def k1_kl(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    """Compute log pi(y) - log ref(y): its value is unbiased, of either sign; its gradient is zero in expectation."""
    return _log_ratio(policy_logits, reference_logits, sequences)


def k2_kl(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    """Compute (log pi(y) - log ref(y))^2 / 2: its value is biased, its gradient is an unbiased one of the KL.

    The gradient is that of the score function, the log-ratio times the gradient of log pi(y), without a baseline.
    Source of k1, k2 and k3: J. Schulman, http://joschu.net/blog/kl-approx.html.
    """
    return _log_ratio(policy_logits, reference_logits, sequences).square() / 2


def k3_kl(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    """Compute exp(w) - 1 - w with w = log ref(y) - log pi(y): its value is unbiased and never negative.

    In expectation the gradient is that of the *other* direction, KL(reference || policy). The mean of exp(w) depends
    on rare sequences once the KL exceeds a few nats. float32 suffices: for samples of the policy, the probability of
    w > 80 is below exp(-80).
    """
    w = -_log_ratio(policy_logits, reference_logits, sequences)
    return torch.expm1(w) - w


KLEstimator = Literal["tokenwise", "unbiased", "k1", "k2", "k3"]
KL_ESTIMATORS: Mapping[KLEstimator, Callable[[Logits, Logits, Sequences], Tensor]] = {
    "tokenwise": tokenwise_kl,
    "unbiased": unbiased_kl,
    "k1": k1_kl,
    "k2": k2_kl,
    "k3": k3_kl,
}
"""Estimators by their names in a configuration."""


def _log_ratio(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    """Return the ``(N,)`` log pi(y) - log ref(y): small differences of tokens are summed, not large sums subtracted."""
    targets = completion_targets(sequences)
    return sum_per_sequence(token_logps(policy_logits, targets) - token_logps(reference_logits, targets), sequences)


def _later_minus_baseline(values: Tensor, sequences: Sequences) -> Tensor:
    """Return ``(M,)``: the sum of the values after each token, minus its mean over the other sequences there."""
    width, cells = sequences.input_ids.shape[1], sequences.left_aligned_index
    padded = values.new_zeros(sequences.input_ids.numel()).index_copy(0, cells, values).view(-1, width)
    later = padded.flip(1).cumsum(1).flip(1) - padded
    reached = torch.arange(width, device=values.device) < sequences.completion_length[:, None]
    baseline = (later.sum(0) - later) / (reached.sum(0) - 1).clamp(min=1)
    return (later - baseline).flatten()[cells]
