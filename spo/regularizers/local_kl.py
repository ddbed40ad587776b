"""The regularizer SPO argues against, for ablation: the KL on the data set's own responses."""

from __future__ import annotations

from typing import ClassVar, Literal

from spo.regularizers.base import Regularizer


class LocalKL(Regularizer):
    """Token-wise KL(policy || reference) along the responses of the batch (chosen and rejected).

    What the policy does outside the data set's responses is not seen by it. The responses are given, not drawn from
    the policy: there is no dependence of the prefixes on the parameters for a score term to account for, and the
    log-ratio estimators are about samples of the policy. So there is one estimator, the token-wise one.

    Args:
        weight: coefficient of R, or ``"beta"`` to follow the beta schedule.
    """

    source: ClassVar[Literal["dataset"]] = "dataset"
