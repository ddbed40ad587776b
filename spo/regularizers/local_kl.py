"""The regularizer that SPO argues against, for ablation: the KL on the data set's own responses."""

from __future__ import annotations

from torch import Tensor

from spo.ops import KL_ESTIMATORS, Logits
from spo.regularizers.base import PairRegularizer
from spo.types import Sequences


class LocalKL(PairRegularizer):
    """Token-wise KL(policy || reference) along the responses of the batch (chosen and rejected).

    It does not see what the policy does outside the data set's responses. These are given, not drawn from the policy:
    their prefixes do not depend on the parameters, so there is no score term to account for, and the log-ratio
    estimators are about samples of the policy. So there is one estimator, the token-wise one.

    Args:
        weight: Coefficient of R, or ``"beta"`` to follow the beta schedule.
    """

    def __call__(self, policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
        """Return ``(N,)`` nats, see :class:`PairRegularizer`."""
        return KL_ESTIMATORS["tokenwise"](policy_logits, reference_logits, sequences)
