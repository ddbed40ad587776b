"""The base classes of losses: pure functions of summed log-probabilities that declare what they need."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from inspect import getattr_static
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from spo.losses.declarations import Feature, Role, Term
from spo.losses.margins import is_higher, log_ratios
from spo.losses.rows import expected, one_of_each_row, weighted
from spo.types import LabelledLogps, ListLogps, Logps, PairLogps

LogpsT = TypeVar("LogpsT", bound=Logps)
LOSS_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Metrics that every loss has, as far as its data has them."""


class _OldName:
    """A declaration of version 0.1.0, which reads and sets that of today.

    Args:
        name: Name of the declaration today.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, loss: Any, owner: type) -> Any:
        return getattr(owner if loss is None else loss, self.name)

    def __set__(self, loss: Any, value: Any) -> None:
        setattr(loss, self.name, self.translated(value))

    def translated(self, value: Any) -> Any:
        """Return the value of today's declaration."""
        return value


class _MetricNames(_OldName):
    """Keys of all metrics of a loss, of which a loss declares today only those that not every loss has."""

    def __get__(self, loss: Any, owner: type) -> tuple[str, ...]:
        return (*LOSS_METRICS, *super().__get__(loss, owner))

    def translated(self, value: Any) -> Any:
        if isinstance(value, property):
            return property(lambda loss: self.translated(value.__get__(loss)))
        return tuple(key for key in value if key not in LOSS_METRICS)


_OLD_NAMES = {"uses_batch_statistics": _OldName("full_batch"), "metric_names": _MetricNames("extra_metrics")}
"""Declarations of version 0.1.0."""


class Loss(ABC, Generic[LogpsT]):
    """A loss of ``B`` pairs, lists or labelled completions. Subclasses declare what a run has to provide.

    Derive a loss from :class:`PreferenceLoss`, :class:`ListLoss` or :class:`LabelledLoss`. A loss may be an
    ``nn.Module`` too, as the second base class: its parameters are then trained with the policy, its buffers are in
    checkpoints, and ``loss.safetensors`` in the run directory has both.

    Attributes:
        inputs: Shape of the log-probs that the loss reads, which also decides what kind of data fits.
        uses_reference: The loss reads log-probs of the reference.
        uses_rejected: The loss reads the rejected completion; false only for methods that learn from completions alone.
        uses_alpha: The loss reads alpha.
        uses_beta: The loss reads beta; if false, beta is free to be the weight of the regularizer.
        terms: Numbers of each completion that are computed from token log-probs or logits, by name. The loss reads
            them as ``logps.terms[name]``.
        features: Numbers of a row, by name, as ``logps.features[name]``.
        extra_completions: Further completions of each prompt, by name, as ``logps.extra[name]``.
        extra_references: Names of references beside the main one, whose log-probs are ``logps.references[name]``. The
            configuration gives each name a model (``extra_references.NAME=PATH``).
        reads_soft_labels: The code of the loss reads soft labels itself. By default it is called for each outcome of
            the label, which is not an expectation where the loss of a row depends on the labels of others.
        full_batch: The loss of a pair depends on the other pairs. It is then called once with all pairs of the
            optimizer step, over micro-batches and processes, or with all pairs of the split in a validation.
        no_optimum: Reason why the expected loss does not have a single minimum that descent settles at; empty if it has
            one or nobody looked.
        extra_metrics: Keys of metrics that :meth:`metrics` returns beside :data:`LOSS_METRICS`. Processes exchange
            metrics by position, so the keys are known before the first batch.
    """

    inputs: type[Logps] = PairLogps
    uses_reference: bool = True
    uses_rejected: bool = True
    uses_alpha: bool = False
    uses_beta: bool = True
    terms: Mapping[str, Term] = {}
    features: Mapping[str, Feature] = {}
    extra_completions: Mapping[str, Role] = {}
    extra_references: tuple[str, ...] = ()
    reads_soft_labels: bool = False
    full_batch: bool = False
    no_optimum: str = ""
    extra_metrics: tuple[str, ...] = ()
    uses_batch_statistics = _OLD_NAMES["uses_batch_statistics"]
    metric_names = _OLD_NAMES["metric_names"]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, old in _OLD_NAMES.items():
            declared = getattr_static(cls, name)  # It may be that of a second base class, which is not a loss.
            if declared is not old:
                warnings.warn(f"{cls.__name__}.{name} is now {old.name}", DeprecationWarning, stacklevel=2)
                setattr(cls, old.name, old.translated(declared))
                setattr(cls, name, old)  # The name of today decides in classes that derive from this one.

    @property
    def needs_reference_logits(self) -> bool:
        """Return whether a term reads token log-probs or logits of the reference."""
        return any(term.needs_reference_logits for term in self.terms.values())

    @property
    def needs_policy_states(self) -> bool:
        """Return whether a term reads hidden states of the policy."""
        return any(term.needs_policy_states for term in self.terms.values())

    @property
    def per_completion_features(self) -> list[str]:
        """Return the names of the features that have a number for each completion."""
        return [name for name, feature in self.features.items() if feature.per_completion]

    @property
    def has_width(self) -> bool:
        """Return whether the loss has parameters whose shape depends on the policy."""
        return type(self).fit_width is not Loss.fit_width

    def fit_width(self, width: int) -> None:
        """Make the parameters whose shape depends on the policy. Called once, before anything reads the parameters.

        The random state follows from the seed of the run alone.

        Args:
            width: Number H of elements of a hidden state of the policy.
        """

    @property
    def has_statistics(self) -> bool:
        """Return whether the loss updates statistics from all pairs of each optimizer step."""
        return type(self).update_statistics is not Loss.update_statistics

    def update_statistics(self, logps: LogpsT) -> None:
        """Update running statistics, which are buffers of the loss. Called once before the loss of a training step.

        Args:
            logps: Detached log-probs of all pairs of the optimizer step, over micro-batches and processes. Every
                process gets the same ones.
        """

    @abstractmethod
    def __call__(self, logps: LogpsT, /, *, alpha: float, beta: float) -> Tensor:
        """Compute the loss of each pair, list or completion.

        Args:
            logps: Log-probabilities of ``B`` pairs, lists or completions.
            alpha: Softness.
            beta: Temperature of the method, if it has one.

        Returns:
            ``(B,)``; the batch loss is the mean.
        """

    @abstractmethod
    def metrics(self, logps: LogpsT, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of each pair, list or completion.

        Args:
            logps: Log-probabilities of ``B`` pairs, lists or completions.
            alpha: Softness.
            beta: Temperature of the method, if it has one.

        Returns:
            ``(B,)`` for each of ``metric_names``, except those that the data does not have. NaN marks a row that does
            not have a metric, such as the reward of a rejected completion where there is a desirable one only.
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
    """A loss of pairs. It applies soft labels and weights; subclasses write :meth:`of_pairs`."""

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the loss of each pair if chosen is certainly better, without weights and soft labels.

        A loss that declares ``reads_soft_labels`` gets soft labels, and returns the expected losses.

        Args:
            pair: Log-probabilities of ``B`` pairs.
            alpha: Softness.
            beta: Temperature of the method, if it has one.

        Returns:
            ``(B,)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must write of_pairs")

    def __call__(self, pair: PairLogps, /, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` expected loss of each pair over its label, times its weight."""
        preference = pair.preference

        def of(given: PairLogps) -> Tensor:
            return one_of_each_row(self, self.of_pairs(given, alpha=alpha, beta=beta), given, ".of_pairs")

        if preference is None or not self.uses_rejected or self.reads_soft_labels:
            return weighted(of(pair), pair)
        swapped = pair.swapped(self.per_completion_features)
        right, wrong = (
            rows_where(preference == 0, swapped, pair),
            rows_where(preference == 1, pair, swapped),
        )
        return weighted(expected(preference, of(right), of(wrong)), pair)

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

    inputs: type[Logps] = ListLogps

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
        preference, order, reverse = lists.preference, lists.order, lists.order.flip(-1)

        def of(order: Tensor) -> Tensor:
            given = replace(lists, order=order).best_first(self.per_completion_features)
            return one_of_each_row(self, self.of_ranking(given, alpha=alpha, beta=beta), given, ".of_ranking")

        if preference is None:
            return weighted(of(order), lists)
        right = torch.where(preference[:, None] == 0, reverse, order)
        wrong = torch.where(preference[:, None] == 1, order, reverse)
        return weighted(expected(preference, of(right), of(wrong)), lists)

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


class LabelledLoss(Loss[LabelledLogps]):
    """A loss of completions that are labelled good or bad. It applies soft labels and weights.

    Subclasses write :meth:`of_labels`.
    """

    inputs: type[Logps] = LabelledLogps
    uses_rejected: bool = False

    @abstractmethod
    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the loss of each completion for a label of 1 (desirable) or 0, without weights.

        A loss that declares ``reads_soft_labels`` gets soft labels, and returns the expected losses.

        Args:
            logps: Log-probabilities of ``B`` completions, with labels 1 or 0.
            alpha: Softness.
            beta: Temperature of the method, if it has one.

        Returns:
            ``(B,)``.
        """

    def __call__(self, logps: LabelledLogps, /, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` expected loss of each completion over its label, times its weight."""
        label = logps.label

        def of(is_good: Tensor) -> Tensor:
            given = replace(logps, label=is_good.to(label.dtype))
            return one_of_each_row(self, self.of_labels(given, alpha=alpha, beta=beta), given, ".of_labels")

        if self.reads_soft_labels:
            return weighted(of(label), logps)
        return weighted(expected(label, of(label > 0), of(label == 1)), logps)

    def rewards(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        """Return the ``(B,)`` implicit rewards for metrics, by default ``beta * (log pi - log pi_ref)``."""
        return beta * (logps.policy if logps.reference is None else logps.policy - logps.reference)

    def metrics(self, logps: LabelledLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of :meth:`Loss.metrics`: "chosen" are desirable completions, "rejected" the others."""
        rewards, desirable = self.rewards(logps, alpha=alpha, beta=beta), logps.label > 0.5
        missing = torch.nan
        return {
            "rewards/chosen": rewards.masked_fill(~desirable, missing),
            "rewards/rejected": rewards.masked_fill(desirable, missing),
            "logps/chosen": logps.policy.masked_fill(~desirable, missing),
            "logps/rejected": logps.policy.masked_fill(desirable, missing),
        }


def rows_where(rows: Tensor, pair: PairLogps, other: PairLogps) -> PairLogps:
    """Return the ``(B,)`` masked rows from ``pair``, and the others from ``other``."""
    columns = pair.columns()
    return pair.with_columns(
        {
            path: torch.where(rows.view(-1, *[1] * (value.ndim - 1)), columns[path], value)
            for path, value in other.columns().items()
        }
    )
