"""The KL that the other regularizers estimate, for languages that can be enumerated."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from spo.regularizers.base import Regularizer


class EnumeratedKL(Regularizer):
    """KL(policy || reference) as a sum over every response, with its exact gradient.

    It is what samples of the policy estimate (see :class:`~spo.regularizers.GlobalKL`), without sampling error, and
    needs a data set whose responses can be enumerated.

    Args:
        weight: coefficient of the KL, or ``"beta"`` to follow the beta schedule.
    """

    source: ClassVar[Literal["enumeration"]] = "enumeration"

    def exact(self, policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
        """``(P,)`` nats from ``(P, R)`` log-probabilities of all ``R`` responses to ``P`` prompts."""
        return (policy_logps.exp() * (policy_logps - reference_logps)).sum(-1)
