"""Length-desensitized DPO."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import Fraction
from spo.losses.base import PreferenceLoss
from spo.losses.declarations import Term
from spo.losses.margins import both_log_ratios
from spo.types import PairLogps


class LDDPOLoss(PreferenceLoss):
    r"""LD-DPO, arXiv:2409.06411: tokens beyond the length of the shorter completion count less.

    .. math:: L = -\log\sigma(\beta [u'(y_w) - u'(y_l)]), \quad
              u'(y) = \sum_{t \le l} u_t + a \sum_{t > l} u_t, \quad l = \min(|y_w|, |y_l|)

    where u_t is the log-ratio of policy and reference at token t, and u' is ``(B,)``.

    Args:
        tail_weight: Weight a of the tokens beyond the shorter length. 1 is DPO, 0 drops them.

    Raises:
        ValueError: ``tail_weight`` is outside [0, 1].
    """

    def __init__(self, tail_weight: Fraction = 0.5) -> None:
        if not 0 <= tail_weight <= 1:
            raise ValueError(f"tail_weight must be in [0, 1], got {tail_weight}")
        self.tail_weight = tail_weight
        self.terms = {
            "policy_prefix": Term(lambda scored: scored.common_prefix(scored.policy_tokens)),
            "reference_prefix": Term(
                lambda scored: scored.common_prefix(scored.reference_tokens), needs_reference_logits=True
            ),
        }

    def _ratios(self, pair: PairLogps) -> Tensor:
        """Return the ``(2, B)`` log-ratios with weighted tails."""
        whole, prefix = torch.stack(both_log_ratios(pair)), pair.terms["policy_prefix"] - pair.terms["reference_prefix"]
        return prefix + self.tail_weight * (whole - prefix)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = self._ratios(pair)
        return -logsigmoid(beta * (chosen - rejected))

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return beta times the log-ratios with weighted tails."""
        chosen, rejected = beta * self._ratios(pair)
        return chosen, rejected
