"""What a regularizer is: a divergence per sequence, and a declaration of the sequences it is taken over."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from torch import Tensor

from spo.bounds import NonNegativeFloat
from spo.ops import KL_ESTIMATORS, KLEstimator, Logits
from spo.types import Sequences

Weight = NonNegativeFloat | Literal["beta"]


class Regularizer:
    """A term ``weight * R`` added to the preference loss.

    Attributes:
        source: where its sequences come from: ``"policy"`` (samples of the current policy), ``"dataset"`` (the
            responses of the batch), ``"enumeration"`` (every response) or ``None`` (there is no term).
        weight: the coefficient of R; ``"beta"`` follows the beta schedule.
        estimator: how R is estimated on a sequence, a name in :data:`spo.ops.KL_ESTIMATORS`.
    """

    source: ClassVar[Literal["policy", "dataset", "enumeration"] | None]
    estimator: KLEstimator = "tokenwise"

    def __init__(self, weight: Weight) -> None:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight != "beta" and not (number and 0 <= weight < math.inf):
            raise ValueError(f"regularizer.weight must be a finite number >= 0 or 'beta', got {weight!r}")
        self.weight = weight

    def weight_at(self, beta: float) -> float:
        """The coefficient of R while the beta schedule stands at ``beta``."""
        return beta if self.weight == "beta" else float(self.weight)

    def __call__(self, policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
        """The estimate of KL(policy || reference) on each sequence.

        Args:
            policy_logits: ``(M, V)`` at the completion tokens of ``sequences``.
            reference_logits: ``(M, V)`` at the same tokens, without gradient.
            sequences: ``N`` sequences.

        Returns:
            ``(N,)`` nats.
        """
        return KL_ESTIMATORS[self.estimator](policy_logits, reference_logits, sequences)


class NoRegularizer(Regularizer):
    """The preference loss alone."""

    source: ClassVar[None] = None

    def __init__(self) -> None:
        super().__init__(weight=0.0)
