"""Token-level DPO, in its two variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import NonNegativeFloat
from spo.losses.base import PreferenceLoss
from spo.losses.declarations import Term
from spo.losses.margins import log_ratio_margin
from spo.ops import at_least_float32, by_rows
from spo.types import PairLogps

if TYPE_CHECKING:
    from spo.objective import ScoredBatch


class TDPOLoss(PreferenceLoss):
    r"""TDPO1 and TDPO2, arXiv:2404.11999.

    .. math:: L = -\log\sigma\left(\beta \left[h - \alpha \left(D(y_l) - D(y_w)\right)\right]\right), \quad
              D(y) = \sum_t KL\left(\pi_{ref}(\cdot|x, y_{<t}) \,\|\, \pi(\cdot|x, y_{<t})\right)

    where h is the margin of DPO, ``(B,)``, and D is the forward divergence along a completion, summed over its tokens.
    TDPO1 has alpha = 1 and differentiates both D. TDPO2 holds D(y_w) constant in the gradient.

    Args:
        kl_weight: Weight alpha of the divergences.
        detach_chosen: Hold D(y_w) constant in the gradient: true for TDPO2, false for TDPO1.

    Raises:
        ValueError: ``kl_weight`` is negative.
    """

    def __init__(self, kl_weight: NonNegativeFloat = 0.5, detach_chosen: bool = True) -> None:
        if not kl_weight >= 0:
            raise ValueError(f"kl_weight must be >= 0, got {kl_weight}")
        self.kl_weight, self.detach_chosen = kl_weight, detach_chosen
        self.terms = {"kl": Term(forward_kl, needs_reference_logits=True)}

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = pair.terms["kl"]
        divergence = rejected - (chosen.detach() if self.detach_chosen else chosen)
        return -logsigmoid(beta * (log_ratio_margin(pair) - self.kl_weight * divergence))

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return beta times the log-ratio plus D, the rewards of the official code."""
        chosen, rejected = super().rewards(pair, alpha=alpha, beta=beta)
        divergence = beta * pair.terms["kl"]
        return chosen + divergence[0], None if rejected is None else rejected + divergence[1]


def forward_kl(scored: ScoredBatch) -> Tensor:
    """Return ``(n, B)`` sums of KL(reference || policy) over the tokens of each completion, with gradient."""

    def of_tokens(policy: Tensor, reference: Tensor) -> Tensor:
        log_p, log_q = (at_least_float32(logits).log_softmax(-1) for logits in (policy, reference))
        # A token that the reference masks counts as zero: its log-ratio may be undefined.
        difference = (log_q - log_p).masked_fill(log_q == -float("inf"), 0)
        return (log_q.exp() * difference).sum(-1)

    assert scored.reference is not None, "the term declares needs_reference_logits"
    return scored.per_completion(by_rows(of_tokens, scored.policy, scored.reference))
