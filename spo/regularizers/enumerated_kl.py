"""The KL that the other regularizers estimate, for languages that can be enumerated."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from spo.objective import EnumeratedDivergence, Run
from spo.ops import kl
from spo.regularizers.base import Regularizer


class EnumeratedKL(Regularizer):
    """KL(policy || reference) as a sum over every response, with its exact gradient.

    It is what samples of the policy estimate (see :class:`~spo.regularizers.GlobalKL`), without sampling error, and
    needs a data set whose responses can be enumerated.

    Args:
        weight: Coefficient of the KL, or ``"beta"`` to follow the beta schedule.
    """

    needs_enumeration: ClassVar[bool] = True

    def __call__(self, policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
        """Return ``(P,)`` nats from ``(P, R)`` log-probabilities of all ``R`` responses to ``P`` prompts."""
        return kl(policy_logps, reference_logps)

    def part(self, run: Run) -> EnumeratedDivergence:
        """Build the part that holds every response.

        Raises:
            ValueError: The data set of the run cannot be enumerated.
        """
        if run.enumeration is None:
            raise ValueError("EnumeratedKL sums over every response, but the data set cannot be enumerated")
        return EnumeratedDivergence(run, self.weight_at, self, run.enumeration)

    def kl_weight(self, beta: float) -> float:
        """Return the coefficient of the KL: R is that KL."""
        return self.weight_at(beta)
