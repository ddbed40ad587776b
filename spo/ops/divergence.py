"""Entropy of, and divergence between, next-token distributions over the whole vocabulary."""

from __future__ import annotations

from torch import Tensor

from spo.ops.logps import at_least_float32, by_rows


def token_kl(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(policy || reference) of the next-token distribution at each position.

    Summed along a sequence drawn from the policy it is, in expectation, the KL between the sequence distributions
    (chain rule); SPO's token-wise estimator (arXiv:2405.00747) takes its gradient through the policy's conditionals.

    Args:
        policy_logits: ``(M, V)``.
        reference_logits: ``(M, V)``; no gradient should flow through it.

    Returns:
        ``(M,)`` nats, non-negative up to rounding.
    """

    def rows(policy: Tensor, reference: Tensor) -> Tensor:
        log_p = at_least_float32(policy).log_softmax(-1)
        log_q = at_least_float32(reference).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    return by_rows(rows, policy_logits, reference_logits)


def token_entropy(logits: Tensor) -> Tensor:
    """``(M,)`` entropy in nats of each next-token distribution given by ``(M, V)`` logits."""

    def rows(logits: Tensor) -> Tensor:
        log_p = at_least_float32(logits).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    return by_rows(rows, logits)
