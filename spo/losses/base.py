"""What every preference loss is: a pure function of summed log-probabilities, and a declaration of what it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from spo.types import ListLogps, PairLogps

Logps = TypeVar("Logps", PairLogps, ListLogps)


class Loss(ABC, Generic[Logps]):
    """A method's loss. Subclasses say, as class attributes, what a run has to provide.

    Attributes:
        uses_reference: reads ``reference_chosen`` (and ``reference_rejected``).
        uses_rejected: reads ``policy_rejected``; false only for methods that learn from completions alone.
        uses_alpha: reads alpha.
        uses_beta: reads beta itself; where false, beta is free to be the regularizer's weight.
        uses_batch_statistics: a pair's loss depends on the other pairs forwarded with it, so that gradients
            change with the size of the micro-batch.
        uses_lists: sees whole lists of completions, best first, as `ListLogps`; a pair is a list of two.
    """

    uses_reference: ClassVar[bool] = True
    uses_rejected: ClassVar[bool] = True
    uses_alpha: ClassVar[bool] = False
    uses_beta: ClassVar[bool] = True
    uses_batch_statistics: ClassVar[bool] = False
    uses_lists: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, logps: Logps, /, *, alpha: float, beta: float) -> Tensor:
        """The loss of each pair or list.

        Args:
            logps: log-probabilities of ``B`` pairs or lists.
            alpha: softness.
            beta: temperature of the method, where it has one.

        Returns:
            ``(B,)``; the batch loss is their mean.
        """

    @abstractmethod
    def metrics(self, logps: Logps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """``(B,)`` of each: ``rewards/{chosen,rejected,margins,accuracies}`` and ``logps/{chosen,rejected}``."""

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor | None:
        """The policy that minimises the expected loss without a regularizer, where it has a closed form.

        The expectation is over preferences of Bradley and Terry (for lists, Plackett and Luce) with the given rewards,
        on independent and uniform draws from the whole set of responses.

        Args:
            rewards: ``(..., R)`` of every response to a prompt.
            reference_logps: ``(..., R)`` log pi_ref of the same responses.
            alpha: softness.
            beta: temperature of the method.
            lengths: ``(..., R)`` tokens of the responses, for losses that read lengths.

        Returns:
            ``(..., R)`` log-probabilities; ``None`` where no closed form is known.
        """
        return None


class PreferenceLoss(Loss[PairLogps]):
    """A loss of pairs."""

    @abstractmethod
    def __call__(self, pair: PairLogps, /, *, alpha: float, beta: float) -> Tensor:
        """``(B,)``, see :class:`Loss`."""

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Implicit rewards of chosen and rejected, for metrics: ``beta (log pi - log pi_ref)`` unless overridden.

        Returns:
            Two ``(B,)`` tensors, the second ``None`` where there is no rejected completion.
        """
        chosen, rejected = log_ratios(pair)
        return beta * chosen, None if rejected is None else beta * rejected

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """``(B,)`` of each, see :class:`Loss`; without a rejected completion, of the chosen one alone."""
        chosen, rejected = self.rewards(pair, alpha=alpha, beta=beta)
        metrics = {"rewards/chosen": chosen, "logps/chosen": pair.policy_chosen}
        if rejected is None or pair.policy_rejected is None:
            return metrics
        return metrics | {
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/rejected": pair.policy_rejected,
        }


class ListLoss(Loss[ListLogps]):
    """A loss of ranked lists: order, weights and soft labels are seen to here, subclasses write :meth:`of_ranking`."""

    uses_lists: ClassVar[bool] = True

    @abstractmethod
    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        """``(B,)`` losses of lists whose completions stand best first, missing ones last."""

    def __call__(self, lists: ListLogps, /, *, alpha: float, beta: float) -> Tensor:
        """``(B,)``, see :class:`Loss`: the expectation over the label, which is the order or its reverse."""
        losses = self.of_ranking(lists.best_first(), alpha=alpha, beta=beta)
        if lists.preference is not None:
            reverse = replace(lists, order=lists.order.flip(-1)).best_first()
            other = self.of_ranking(reverse, alpha=alpha, beta=beta)
            losses = lists.preference * losses + (1 - lists.preference) * other
        return weighted(losses, lists)

    def rewards(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        """``(B, n)`` implicit rewards, for metrics: ``beta (log pi - log pi_ref)`` unless overridden."""
        return beta * (lists.policy if lists.reference is None else lists.policy - lists.reference)

    def metrics(self, lists: ListLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """``(B,)`` of each, see :class:`Loss`: rejected is the mean over all but the best, of which accuracies is the
        share that the best one beats.
        """
        lists = lists.best_first()
        rewards, others = self.rewards(lists, alpha=alpha, beta=beta), lists.mask[:, 1:]

        def mean(values: Tensor) -> Tensor:
            return values.masked_fill(~others, 0).sum(-1) / others.sum(-1).clamp(min=1)

        chosen, rejected = rewards[:, 0], mean(rewards[:, 1:])
        metrics = {"rewards/chosen": chosen, "logps/chosen": lists.policy[:, 0]}
        if others.shape[1] == 0:
            return metrics
        return metrics | {
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": mean((chosen[:, None] > rewards[:, 1:]).float()),
            "logps/rejected": mean(lists.policy[:, 1:]),
        }


class _Adapted(PreferenceLoss):
    """A loss not derived from :class:`Loss`; what it does not declare has the defaults of that class."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss
        for name in DECLARATIONS:
            setattr(self, name, getattr(loss, name, getattr(Loss, name)))

    def __call__(self, pair: PairLogps, /, *, alpha: float, beta: float) -> Tensor:
        return self.loss(pair, alpha=alpha, beta=beta)

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        own = getattr(self.loss, "rewards", super().rewards)
        return own(pair, alpha=alpha, beta=beta)

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor | None:
        own = getattr(self.loss, "optimum", super().optimum)
        return own(rewards, reference_logps, alpha, beta)


DECLARATIONS = ("uses_reference", "uses_rejected", "uses_alpha", "uses_beta", "uses_batch_statistics", "uses_lists")


def as_loss(loss: Callable[..., Tensor]) -> Loss[Any]:
    """Any callable with the signature of a loss as a :class:`Loss`.

    Raises:
        ValueError: it reads lists, and is not derived from :class:`ListLoss`.
    """
    if isinstance(loss, Loss):
        return loss
    if getattr(loss, "uses_lists", False):
        raise ValueError(f"{type(loss).__name__} declares uses_lists: derive it from spo.losses.ListLoss")
    return _Adapted(loss)


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


def weighted(losses: Tensor, logps: PairLogps | ListLogps) -> Tensor:
    """``(B,)`` losses times the weights of the pairs or lists, where there are any."""
    return losses if logps.weight is None else losses * logps.weight
