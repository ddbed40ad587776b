"""Unified Preference Optimization, first named Hybrid Preference Optimization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt
from torch import Tensor, nn

from spo.bounds import NonNegativeFloat, OpenFraction, PositiveFloat
from spo.losses.declarations import Feature, Term
from spo.losses.heads import StateHead
from spo.losses.kto import KTOLoss
from spo.types import LabelledLogps

if TYPE_CHECKING:
    from spo.objective import ScoredBatch

Reward = Callable[[Sequence[str], Sequence[str]], dict[str, list[float]]]
"""Function ``reward(prompts, completions)`` of texts that returns their rewards under the key ``reward``."""


class UPOLoss(KTOLoss, nn.Module):
    r"""UPO, arXiv:2405.17956: KTO, and a likelihood that is weighted by the advantage in an auxiliary reward.

    .. math:: L = L_{KTO} - \gamma\, w \log\pi(y|x) + \lambda\, |\tau - 1[A < 0]|\, A^2, \quad
              w = \min\left(e^{A / T}, w_{max}\right), \quad A = R(x, y) - V(x)

    where R is the auxiliary reward, ``(B,)``, and V is the value: a linear function of the policy's last hidden state
    at the last token of the prompt, ``(B,)``. The weight w is constant in the gradient. The last term is an expectile
    regression, eq. 12, whose gradient reaches the value alone. The value is 0 before training and learns with the
    learning rate of the policy.

    This is a reconstruction. The equations of the paper were not read: T, tau, gamma and lambda, the input of the
    value, and that it sees the prompt alone are ours. The limit of the weight is ours too; the paper does not have one.

    Args:
        gamma: Weight of the likelihood; 0 is KTO for the policy.
        temperature: Scale T of the advantage.
        expectile: Expectile tau that the value estimates; 0.5 is the mean.
        value_weight: Weight lambda of the regression.
        max_weight: Largest weight w of a completion.
        reward: Function of texts that computes the reward of rows without the column ``auxiliary_reward``. ``None``
            makes the column required.
        desirable_weight: Weight of desirable completions in KTO.
        undesirable_weight: Weight of the others in KTO.
        skip_zeros: Leave log-ratios that are exactly zero out of the estimate of the KL in KTO.

    Raises:
        ValueError: An option is out of its range.
    """

    extra_metrics = (*KTOLoss.extra_metrics, "upo/value", "upo/weight")

    def __init__(
        self,
        gamma: NonNegativeFloat = 1.0,
        temperature: PositiveFloat = 1.0,
        expectile: OpenFraction = 0.7,
        value_weight: NonNegativeFloat = 1.0,
        max_weight: Annotated[float, Gt(0)] = 100.0,
        *,
        reward: Reward | None,
        desirable_weight: NonNegativeFloat = 1.0,
        undesirable_weight: NonNegativeFloat = 1.0,
        skip_zeros: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        super().__init__(desirable_weight, undesirable_weight, skip_zeros)
        for name, value in (("gamma", gamma), ("value_weight", value_weight)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if not (temperature > 0 and max_weight > 0 and 0 < expectile < 1):
            raise ValueError(
                "temperature and max_weight must be positive and expectile between 0 and 1, got "
                f"{temperature}, {max_weight} and {expectile}"
            )
        if reward is not None and not callable(reward):
            raise ValueError(f"reward must be a function of texts with _partial_, or null, got {reward!r}")
        self.gamma, self.temperature, self.expectile = gamma, temperature, expectile
        self.value_weight, self.max_weight = value_weight, max_weight
        make = None if reward is None else _rewards_by(reward)
        self.features = {"auxiliary_reward": Feature("auxiliary_reward", each=True, make=make)}
        self.terms = {"value": Term(self.values_of, needs_policy_states=True)}
        self.value_head: StateHead | None = None

    def fit_width(self, width: int) -> None:
        """Make the layer that computes the value."""
        self.value_head = StateHead(width, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def values_of(self, scored: ScoredBatch) -> Tensor:
        """Return V of each completion, ``(1, B)``; its gradient does not reach the policy.

        Args:
            scored: Scored batch with the hidden states of the policy.

        Raises:
            ValueError: The width of the states was not given by :meth:`fit_width`.
        """
        if self.value_head is None:
            raise ValueError("UPO needs the width of the policy's hidden states: call fit_width(width)")
        return scored.batch.per_completion(self.value_head(scored.prompt_states.detach()).squeeze(-1))

    def advantages(self, logps: LabelledLogps) -> Tensor:
        """Return A of each completion, ``(B,)``, with the gradient of the value."""
        value = logps.terms["value"]
        return logps.features["auxiliary_reward"].to(value) - value

    def weights(self, logps: LabelledLogps) -> Tensor:
        """Return the weight w of each completion, ``(B,)``, without gradient."""
        exponent = self.advantages(logps).detach() / self.temperature
        return exponent.clamp(max=math.log(self.max_weight)).exp()

    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each completion."""
        advantages = self.advantages(logps)
        asymmetry = (self.expectile - (advantages < 0).to(advantages)).abs()
        return (
            super().of_labels(logps, alpha=alpha, beta=beta)
            - self.gamma * self.weights(logps) * logps.policy
            + self.value_weight * asymmetry * advantages**2
        )

    def metrics(self, logps: LabelledLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of KTO, the value of each prompt, and the weight of each completion."""
        found = super().metrics(logps, alpha=alpha, beta=beta)
        return found | {"upo/value": logps.terms["value"], "upo/weight": self.weights(logps)}


def _rewards_by(reward: Reward) -> Callable[[Sequence[str], Sequence[str] | None], list[float]]:
    """Return the rewards of a function alone, as a feature of each completion is made."""

    def make(prompts: Sequence[str], completions: Sequence[str] | None) -> list[float]:
        assert completions is not None, "the feature declares a number of each completion"
        return reward(prompts, completions)["reward"]

    return make
