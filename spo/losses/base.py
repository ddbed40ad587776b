"""The base classes of losses: pure functions of summed log-probabilities that declare what they need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from spo.types import ListLogps, PairLogps

Logps = TypeVar("Logps", PairLogps, ListLogps)


class Loss(ABC, Generic[Logps]):
    """A loss of ``B`` pairs or lists. Subclasses declare, as class attributes, what a run has to provide.

    Derive a loss from :class:`PreferenceLoss` or :class:`ListLoss`.

    Attributes:
        uses_reference: The loss reads ``reference_chosen`` and ``reference_rejected``.
        uses_rejected: The loss reads ``policy_rejected``; false only for methods that learn from completions alone.
        uses_alpha: The loss reads alpha.
        uses_beta: The loss reads beta; if false, beta is free to be the weight of the regularizer.
        uses_batch_statistics: The loss of a pair depends on the other pairs. It is then called once with all pairs of
            the optimizer step, over micro-batches and processes, or with all pairs of the split in a validation.
        uses_lists: The loss takes whole lists of completions, best first, as :class:`~spo.types.ListLogps`. A pair is
            a list of two.
        metric_names: Keys that :meth:`metrics` can return. Processes exchange metrics by position, so the keys are
            known before the first batch, and a loss with another metric adds its key.
    """

    uses_reference: ClassVar[bool] = True
    uses_rejected: ClassVar[bool] = True
    uses_alpha: ClassVar[bool] = False
    uses_beta: ClassVar[bool] = True
    uses_batch_statistics: ClassVar[bool] = False
    uses_lists: ClassVar[bool] = False
    metric_names: ClassVar[tuple[str, ...]] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )

    @abstractmethod
    def __call__(self, logps: Logps, /, *, alpha: float, beta: float) -> Tensor:
        """Compute the loss of each pair or list.

        Args:
            logps: Log-probabilities of ``B`` pairs or lists.
            alpha: Softness.
            beta: Temperature of the method, if it has one.

        Returns:
            ``(B,)``; the batch loss is the mean.
        """

    @abstractmethod
    def metrics(self, logps: Logps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of each pair or list.

        Args:
            logps: Log-probabilities of ``B`` pairs or lists.
            alpha: Softness.
            beta: Temperature of the method, if it has one.

        Returns:
            ``(B,)`` for each of ``metric_names``, except those that the pairs or lists do not have.
        """

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor | None:
        """Return the policy that minimizes the expected loss without a regularizer, if it has a closed form.

        The expectation is over Bradley-Terry preferences (for lists, Plackett-Luce rankings) with the given rewards,
        on independent uniform draws from the set of all responses.

        Args:
            rewards: ``(..., R)`` reward of every response to a prompt.
            reference_logps: ``(..., R)`` log pi_ref(y|x) of the same responses.
            alpha: Softness.
            beta: Temperature of the method.
            lengths: ``(..., R)`` length of each response in tokens, for losses that read lengths.

        Returns:
            ``(..., R)`` normalized log-probabilities, or ``None`` if no closed form is known.
        """
        return None


class PreferenceLoss(Loss[PairLogps]):
    """A loss of pairs."""

    @abstractmethod
    def __call__(self, pair: PairLogps, /, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair, see :meth:`Loss.__call__`."""

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return the implicit rewards for metrics, by default ``beta * (log pi - log pi_ref)``.

        Args:
            pair: Log-probabilities of ``B`` pairs.
            alpha: Softness.
            beta: Temperature of the method.

        Returns:
            ``(B,)`` rewards of the chosen and of the rejected completions; the second is ``None`` without them.
        """
        chosen, rejected = log_ratios(pair)
        return beta * chosen, None if rejected is None else beta * rejected

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of :meth:`Loss.metrics`; without rejected completions, those of the chosen ones."""
        chosen, rejected = self.rewards(pair, alpha=alpha, beta=beta)
        metrics = {"rewards/chosen": chosen, "logps/chosen": pair.policy_chosen}
        if rejected is None or pair.policy_rejected is None:
            return metrics
        return metrics | {
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": is_higher(chosen, rejected),
            "logps/rejected": pair.policy_rejected,
        }


class ListLoss(Loss[ListLogps]):
    """A loss of ranked lists. It applies the order, weights and soft labels; subclasses write :meth:`of_ranking`."""

    uses_lists: ClassVar[bool] = True

    @abstractmethod
    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the loss of each list, without weights and soft labels.

        Args:
            lists: Log-probabilities of ``B`` lists, best completions first, missing ones last.
            alpha: Softness.
            beta: Temperature of the method, if it has one.

        Returns:
            ``(B,)``.
        """

    def __call__(self, lists: ListLogps, /, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` expected loss of each list over its label: the order, or the reverse of it."""
        losses = self.of_ranking(lists.best_first(), alpha=alpha, beta=beta)
        if lists.preference is not None:
            reverse = replace(lists, order=lists.order.flip(-1)).best_first()
            other = self.of_ranking(reverse, alpha=alpha, beta=beta)
            losses = lists.preference * losses + (1 - lists.preference) * other
        return weighted(losses, lists)

    def rewards(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        """Return the ``(B, n)`` implicit rewards for metrics, by default ``beta * (log pi - log pi_ref)``."""
        return beta * (lists.policy if lists.reference is None else lists.policy - lists.reference)

    def metrics(self, lists: ListLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of :meth:`Loss.metrics`.

        "Rejected" is the mean over all completions but the best. "Accuracies" is the share of them whose reward is
        below that of the best, with a tie as one half.
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
            "rewards/accuracies": mean(is_higher(chosen[:, None], rewards[:, 1:])),
            "logps/rejected": mean(lists.policy[:, 1:]),
        }


def is_higher(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return 1 where the reward of chosen is higher, 0.5 where both are equal, as before training, and else 0."""
    return ((chosen > rejected).float() + (chosen >= rejected).float()) / 2


def log_ratios(pair: PairLogps) -> tuple[Tensor, Tensor | None]:
    """Return the ``(B,)`` log pi - log pi_ref of chosen and rejected; without a reference, log pi alone."""
    chosen, rejected = pair.policy_chosen, pair.policy_rejected
    if pair.reference_chosen is not None:
        chosen = chosen - pair.reference_chosen
    if rejected is not None and pair.reference_rejected is not None:
        rejected = rejected - pair.reference_rejected
    return chosen, rejected


def policy_margin(pair: PairLogps) -> Tensor:
    """Return the ``(B,)`` log pi(y_w|x) - log pi(y_l|x).

    Raises:
        ValueError: There is no rejected completion.
    """
    if pair.policy_rejected is None:
        raise ValueError("this loss compares two completions, but policy_rejected is None")
    return pair.policy_chosen - pair.policy_rejected


def reference_margin(pair: PairLogps) -> Tensor:
    """Return the ``(B,)`` log pi_ref(y_w|x) - log pi_ref(y_l|x).

    Raises:
        ValueError: A reference log-probability is missing.
    """
    if pair.reference_chosen is None or pair.reference_rejected is None:
        raise ValueError("this loss needs reference_chosen and reference_rejected")
    return pair.reference_chosen - pair.reference_rejected


def expected_loss(of_margin: Callable[[Tensor], Tensor], margin: Tensor, preference: Tensor | None) -> Tensor:
    """Return the expectation of a pairwise loss over its label: ``p f(margin) + (1 - p) f(-margin)``.

    Args:
        of_margin: Loss of a pair as a function of chosen minus rejected.
        margin: ``(B,)`` chosen minus rejected.
        preference: ``(B,)`` probability p that chosen is better; ``None`` for 1.

    Returns:
        ``(B,)``.
    """
    if preference is None:
        return of_margin(margin)
    # A label of probability zero counts as zero, also where its loss would be infinite.
    right, wrong = margin.masked_fill(preference == 0, 0), (-margin).masked_fill(preference == 1, 0)
    return preference * of_margin(right) + (1 - preference) * of_margin(wrong)


def weighted(losses: Tensor, logps: PairLogps | ListLogps) -> Tensor:
    """Return the ``(B,)`` losses times the weights of the pairs or lists, if there are any."""
    return losses if logps.weight is None else losses * logps.weight
