"""What every preference loss is: a pure function of summed log-probabilities, and a declaration of what it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from spo.types import PairLogps


class PreferenceLoss(ABC):
    """A method's loss. Subclasses say, as class attributes, what a run has to provide.

    Attributes:
        uses_reference: reads ``reference_chosen`` (and ``reference_rejected``).
        uses_rejected: reads ``policy_rejected``; false only for methods that learn from completions alone.
        uses_alpha: reads alpha.
        uses_beta: reads beta itself; where false, beta is free to be the regularizer's weight.
        uses_batch_statistics: a pair's loss depends on the other pairs forwarded with it, so that gradients
            change with the size of the micro-batch.
    """

    uses_reference: ClassVar[bool] = True
    uses_rejected: ClassVar[bool] = True
    uses_alpha: ClassVar[bool] = False
    uses_beta: ClassVar[bool] = True
    uses_batch_statistics: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """The loss of each pair.

        Args:
            pair: log-probabilities of ``B`` pairs.
            alpha: softness.
            beta: temperature of the method, where it has one.

        Returns:
            ``(B,)``; the batch loss is their mean.
        """

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Implicit rewards of chosen and rejected, for metrics: ``beta (log pi - log pi_ref)`` unless overridden.

        Returns:
            Two ``(B,)`` tensors, the second ``None`` where there is no rejected completion.
        """
        chosen, rejected = log_ratios(pair)
        return beta * chosen, None if rejected is None else beta * rejected


class _Adapted(PreferenceLoss):
    """A loss not derived from :class:`PreferenceLoss`; what it does not declare has the defaults of that class."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss
        for name in DECLARATIONS:
            setattr(self, name, getattr(loss, name, getattr(PreferenceLoss, name)))

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return self.loss(pair, alpha=alpha, beta=beta)

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        own = getattr(self.loss, "rewards", super().rewards)
        return own(pair, alpha=alpha, beta=beta)


DECLARATIONS = ("uses_reference", "uses_rejected", "uses_alpha", "uses_beta", "uses_batch_statistics")


def as_loss(loss: Callable[..., Tensor]) -> PreferenceLoss:
    """Any callable with the signature of a loss as a :class:`PreferenceLoss`."""
    return loss if isinstance(loss, PreferenceLoss) else _Adapted(loss)


def log_ratios(pair: PairLogps) -> tuple[Tensor, Tensor | None]:
    """``(B,)`` log pi - log pi_ref of chosen and rejected; without a reference, log pi alone."""
    chosen, rejected = pair.policy_chosen, pair.policy_rejected
    if pair.reference_chosen is not None:
        chosen = chosen - pair.reference_chosen
    if rejected is not None and pair.reference_rejected is not None:
        rejected = rejected - pair.reference_rejected
    return chosen, rejected


def policy_margin(pair: PairLogps) -> Tensor:
    """``(B,)`` log pi(y_w|x) - log pi(y_l|x).

    Raises:
        ValueError: there is no rejected completion.
    """
    if pair.policy_rejected is None:
        raise ValueError("this loss compares two completions, but policy_rejected is None")
    return pair.policy_chosen - pair.policy_rejected


def reference_margin(pair: PairLogps) -> Tensor:
    """``(B,)`` log pi_ref(y_w|x) - log pi_ref(y_l|x).

    Raises:
        ValueError: a reference log-probability is missing.
    """
    if pair.reference_chosen is None or pair.reference_rejected is None:
        raise ValueError("this loss needs reference_chosen and reference_rejected")
    return pair.reference_chosen - pair.reference_rejected


def expected_loss(of_margin: Callable[[Tensor], Tensor], margin: Tensor, preference: Tensor | None) -> Tensor:
    """Expectation of a pairwise loss over the label: ``p f(margin) + (1 - p) f(-margin)``, with p = 1 for ``None``.

    Args:
        of_margin: the loss of a pair as a function of chosen minus rejected.
        margin: ``(B,)``.
        preference: ``(B,)`` probability that chosen is the better one.

    Returns:
        ``(B,)``.
    """
    if preference is None:
        return of_margin(margin)
    return preference * of_margin(margin) + (1 - preference) * of_margin(-margin)


def weighted(losses: Tensor, pair: PairLogps) -> Tensor:
    """``(B,)`` losses times the pair weights, where there are any."""
    return losses if pair.weight is None else losses * pair.weight
