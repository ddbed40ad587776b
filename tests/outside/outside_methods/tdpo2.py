"""Token-level DPO: a term that compares the next-token distributions of policy and reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses import PreferenceLoss, Term
from spo.objective import ScoredBatch
from spo.ops import at_least_float32, by_rows
from spo.types import PairLogps


def forward_kl(scored: ScoredBatch) -> Tensor:
    """Return KL(reference || policy), summed over the tokens of each completion."""

    def of_tokens(policy: Tensor, reference: Tensor) -> Tensor:
        log_p, log_q = (at_least_float32(logits).log_softmax(-1) for logits in (policy, reference))
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    return scored.per_completion(by_rows(of_tokens, scored.policy, scored.reference))


class TDPO2Loss(PreferenceLoss):
    """TDPO2, arXiv:2404.11999; the divergence of the chosen completion is constant in the gradient."""

    terms = {"kl": Term(forward_kl, needs_reference_logits=True)}

    def __init__(self, kl_weight: float) -> None:
        self.kl_weight = kl_weight

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        kl_chosen, kl_rejected = pair.terms["kl"]
        margin = pair.policy_chosen - pair.reference_chosen - pair.policy_rejected + pair.reference_rejected
        return -logsigmoid(beta * (margin - self.kl_weight * (kl_rejected - kl_chosen.detach())))

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        chosen, rejected = super().rewards(pair, alpha=alpha, beta=beta)
        kl_chosen, kl_rejected = pair.terms["kl"]
        return chosen + beta * kl_chosen, rejected + beta * kl_rejected
