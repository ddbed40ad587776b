"""Entropy of next-token distributions, and estimators of KL(policy || reference) of sequences.

An estimator maps the logits of a batch of sequences drawn from the policy to one number per sequence. What its value
averages to and what its autograd gradient averages to are two questions: differentiating an unbiased estimate of the
KL does not, in general, estimate the KL's gradient, because the sequences were drawn from the policy too
(arXiv:2506.09477). ``docs/explanation/kl-estimators.md`` has the answers side by side, with variances.
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
    """KL(policy || reference) of the next-token distribution at each position.

    Args:
        policy_logits: ``(M, V)``.
        reference_logits: ``(M, V)``; no gradient flows through it.

    Returns:
        ``(M,)`` nats, non-negative up to rounding.
    """
    return by_rows(_TokenKL.apply, policy_logits, reference_logits)


class _TokenKL(torch.autograd.Function):
    """The divergence with its gradient p * (log p - log q - KL), made in the same passes."""

    @staticmethod
    def forward(ctx: Any, policy: Tensor, reference: Tensor) -> Tensor:
        wide = torch.promote_types(policy.dtype, torch.float32)
        slope = torch.empty_like(policy, dtype=wide) if ctx.needs_input_grad[0] else None
        parts = [policy, reference] if slope is None else [policy, reference, slope]
        values = []
        for p, q, *out in in_cache(*parts):
            log_p, log_q = (at_least_float32(logits).log_softmax(-1) for logits in (p, q))
            ratio = log_p - log_q
            probability = log_p.exp_()
            divergence = (probability * ratio).sum(-1)  # a dot product would be taken in half precision under autocast
            values.append(divergence)
            for rows in out:
                torch.mul(ratio.sub_(divergence[:, None]), probability, out=rows)
        ctx.save_for_backward(slope)
        ctx.dtype = policy.dtype
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return (slope * gradient[:, None]).to(ctx.dtype), None


def token_entropy(logits: Logits) -> Tensor:
    """``(M,)`` entropy in nats of each next-token distribution given by ``(M, V)`` logits."""

    def rows(logits: Tensor) -> Tensor:
        log_p = at_least_float32(logits).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    return by_rows(rows, logits)


# --- estimators of the sequence KL: (M, V) policy logits, (M, V) reference logits, N sequences -> (N,) nats ----------


def tokenwise_kl(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    """Sum over positions of the KL between the next-token distributions; SPO's own (arXiv:2405.00747).

    By the chain rule the value is unbiased, and it is never negative. The gradient goes through the conditional
    distributions and takes the prefixes as given: low variance, biased by the term that :func:`unbiased_kl` adds.
    """
    return sum_per_sequence(token_kl(policy_logits, reference_logits), sequences)


def unbiased_kl(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    r"""The value of :func:`tokenwise_kl` with the whole gradient of the KL in expectation.

    A token decides which prefixes come after it. Its score, times the divergence still to come, is that dependence:

    .. math:: \sum_t \nabla \log \pi(y_t|x, y_{<t}) \Big( \sum_{s>t} KL_s - b_t \Big)

    with b_t the mean of the divergence still to come over the *other* sequences of the batch that reach position t,
    0 where there is none. It is independent of y_t, which keeps the gradient unbiased for batches of any size, as
    long as the sequences are drawn independently of each other given their prompts.
    """
    per_token = token_kl(policy_logits, reference_logits)
    logps = token_logps(policy_logits, completion_targets(sequences))
    score = sum_per_sequence(logps * _excess_to_come(per_token.detach(), sequences), sequences)
    return sum_per_sequence(per_token, sequences) + (score - score.detach())


def k1_kl(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    """Log pi(y) - log ref(y): unbiased value of either sign, gradient of expectation zero."""
    return _log_ratio(policy_logits, reference_logits, sequences)


def k2_kl(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    """(log pi(y) - log ref(y))^2 / 2: biased value, unbiased gradient of the KL.

    The gradient is the score function's, log-ratio times the gradient of log pi(y), without a baseline.
    Source of k1, k2 and k3: J. Schulman, http://joschu.net/blog/kl-approx.html.
    """
    return _log_ratio(policy_logits, reference_logits, sequences).square() / 2


def k3_kl(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    """exp(w) - 1 - w with w = log ref(y) - log pi(y): unbiased value, never negative.

    The gradient is in expectation that of the *other* direction, KL(reference || policy). The mean of exp(w) rests
    on rare sequences once the KL exceeds a few nats. Samples of the policy itself exceed w = 80 with probability
    below exp(-80), so that float32 suffices.
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
"""What the names mean in a configuration."""


def _log_ratio(policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
    """``(N,)`` log pi(y) - log ref(y); the small differences of tokens are added, not the large sums subtracted."""
    targets = completion_targets(sequences)
    return sum_per_sequence(token_logps(policy_logits, targets) - token_logps(reference_logits, targets), sequences)


def _excess_to_come(values: Tensor, sequences: Sequences) -> Tensor:
    """``(M,)`` the sum of a sequence's values after each token, less its mean over the others at that position."""
    width = sequences.input_ids.shape[1]
    row = sequences.completion_index // width
    # Completions moved to the left edge: a column is a position in the completion, wherever the prompts end.
    cells = sequences.completion_index - sequences.prompt_length[row]
    padded = values.new_zeros(sequences.input_ids.numel()).index_copy(0, cells, values).view(-1, width)
    to_come = padded.flip(1).cumsum(1).flip(1) - padded
    reached = torch.arange(width, device=values.device) < sequences.completion_length[:, None]
    others = (to_come.sum(0) - to_come) / (reached.sum(0) - 1).clamp(min=1)
    return (to_come - others).flatten()[cells]
