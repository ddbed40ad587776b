"""Log-probabilities of completions, the inputs of losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from spo.types.batch import PreferenceBatch
from spo.types.movable import Movable


@dataclass(frozen=True)
class CompletionLogps(Movable):
    """Summed log-probabilities of one further completion of each of ``B`` rows.

    Attributes:
        policy: ``(B,)`` log pi(y|x) in nats; without gradient unless the loss declares one.
        length: ``(B,)`` number of tokens.
        reference: ``(B,)`` log pi_ref(y|x), or ``None`` without a reference.
    """

    policy: Tensor
    length: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class Logps(Movable, ABC):
    """Base class of what a loss reads: log-probabilities of ``B`` pairs, lists or labelled completions.

    Numbers of a completion have the layout of the class: ``(2, B)`` for pairs, ``(B, n)`` for lists, ``(B,)`` for
    labelled completions.

    Attributes:
        terms: Numbers of each completion, by name, as ``Loss.terms`` declares them.
        references: Log-probs of each completion under further references, as ``Loss.extra_references`` names them.
        features: ``(B, ...)`` numbers of each row, by name, as ``Loss.features`` declares them.
        extra: Further completions of each prompt, by name, as ``Loss.extra_completions`` declares them.
    """

    terms: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    references: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    features: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    extra: dict[str, CompletionLogps] = field(default_factory=dict, kw_only=True)

    ROWS_LAST: ClassVar[frozenset[str]] = frozenset()
    """Mappings whose tensors have the rows as their last dimension."""
    POLICY: ClassVar[frozenset[str]] = frozenset()
    """Fields with log-probs of the policy."""
    PAIRS_PER_ROW: ClassVar[float] = 1.0
    """Number of pairs that a row counts as in the budget of a run."""

    @classmethod
    @abstractmethod
    def of_batch(cls, batch: PreferenceBatch, policy_logps: Tensor, reference_logps: Tensor | None) -> Self:
        """Return the log-probs of a batch in the shape of this class.

        Args:
            batch: Batch of ``N`` sequences.
            policy_logps: ``(N,)`` summed log-probs of the sequences under the policy.
            reference_logps: ``(N,)`` summed log-probs of the sequences under the reference, or ``None``.
        """

    @staticmethod
    @abstractmethod
    def arrange(values: Tensor) -> Tensor:
        """Return ``(n, B)`` numbers of completions, best first, in the layout of this class."""

    def __len__(self) -> int:
        """Return the number of pairs, lists or completions."""
        return next(len(value) for value in vars(self).values() if isinstance(value, Tensor))

    def columns(self) -> dict[str, Tensor]:
        """Return all tensors as ``(B, ...)`` by their path, such as ``policy_chosen`` or ``terms/kl``."""
        found: dict[str, Tensor] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                found[one.name] = value
            elif one.name == "extra":
                found |= {
                    f"extra/{name}/{part}": tensor
                    for name, logps in value.items()
                    for part, tensor in vars(logps).items()
                    if tensor is not None
                }
            elif isinstance(value, dict):
                found |= {f"{one.name}/{name}": self._rows_first(one.name, value[name]) for name in value}
        return found

    def with_columns(self, columns: Mapping[str, Tensor]) -> Self:
        """Return a copy with other tensors.

        Args:
            columns: All tensors, in the form of :meth:`columns`.
        """
        values: dict[str, Any] = {one.name: None if one.name not in _MAPPINGS else {} for one in fields(self)}
        extra: dict[str, dict[str, Tensor]] = {}
        for path, tensor in columns.items():
            place, _, name = path.partition("/")
            if place == "extra":
                name, _, part = name.rpartition("/")
                extra.setdefault(name, {})[part] = tensor
            elif name:
                values[place][name] = self._rows_first(place, tensor)
            else:
                values[place] = tensor
        values["extra"] = {name: CompletionLogps(**parts) for name, parts in extra.items()}
        return replace(self, **values)

    @classmethod
    def is_of_policy(cls, path: str) -> bool:
        """Return whether gradients of the policy may reach a tensor, by its path in :meth:`columns`."""
        place = path.partition("/")[0]
        return path in cls.POLICY or place == "terms" or (place == "extra" and path.endswith("/policy"))

    def _rows_first(self, place: str, tensor: Tensor) -> Tensor:
        return tensor.T if place in self.ROWS_LAST else tensor


def _in_precision_of(logps: Tensor, *labels: Tensor | None) -> tuple[Any, ...]:
    """Return labels and weights in the dtype of the log-probs: 1 minus a label would round in a smaller one."""
    return tuple(None if label is None else label.to(logps.dtype) for label in labels)


_MAPPINGS = ("terms", "references", "features", "extra")


@dataclass(frozen=True)
class PairLogps(Logps):
    """Summed log-probabilities of the two completions of ``B`` pairs, the input of a preference loss.

    Attributes:
        policy_chosen: ``(B,)`` log pi(y_w|x) in nats, summed over completion tokens.
        policy_rejected: ``(B,)`` log pi(y_l|x); ``None`` only for methods that need completions alone (SFT).
        reference_chosen: ``(B,)`` log pi_ref(y_w|x), or ``None`` without a reference.
        reference_rejected: ``(B,)`` log pi_ref(y_l|x), or ``None``.
        chosen_length: ``(B,)`` number of completion tokens of y_w, end-of-text included.
        rejected_length: ``(B,)`` number of completion tokens of y_l, end-of-text included.
        preference: ``(B,)`` probability that chosen is better; ``None`` for 1.
        weight: ``(B,)`` non-negative weight of each pair; ``None`` for 1.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor | None = None
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    chosen_length: Tensor | None = None
    rejected_length: Tensor | None = None
    preference: Tensor | None = None
    weight: Tensor | None = None

    ROWS_LAST: ClassVar[frozenset[str]] = frozenset({"terms", "references"})
    POLICY: ClassVar[frozenset[str]] = frozenset({"policy_chosen", "policy_rejected"})

    @classmethod
    def of_batch(cls, batch: PreferenceBatch, policy_logps: Tensor, reference_logps: Tensor | None) -> PairLogps:
        """Return the pairs of a batch; of a longer list, the pair is its best two completions."""

        def sides(values: Tensor | None) -> tuple[Any, Any]:
            if values is None:
                return None, None
            chosen, *others = batch.per_completion(values)
            return chosen, others[0] if others else None

        policy, reference = sides(policy_logps), sides(reference_logps)
        length = sides(batch.sequences.completion_length)
        return cls(*policy, *reference, *length, *_in_precision_of(policy_logps, batch.preference, batch.weight))

    @staticmethod
    def arrange(values: Tensor) -> Tensor:
        """Return ``(2, B)`` numbers of the best two completions."""
        return values[:2]

    def swapped(self, per_completion: Iterable[str] = ()) -> PairLogps:
        """Return the pairs with chosen and rejected exchanged, and the label with them.

        Args:
            per_completion: Names of the features that have a number for each completion.

        Raises:
            ValueError: There are no rejected completions.
        """
        if self.policy_rejected is None:
            raise ValueError("this loss compares two completions, but policy_rejected is None")
        both = set(per_completion)
        return replace(
            self,
            policy_chosen=self.policy_rejected,
            policy_rejected=self.policy_chosen,
            reference_chosen=self.reference_rejected,
            reference_rejected=self.reference_chosen,
            chosen_length=self.rejected_length,
            rejected_length=self.chosen_length,
            preference=None if self.preference is None else 1 - self.preference,
            terms={name: value.flip(0) for name, value in self.terms.items()},
            references={name: value.flip(0) for name, value in self.references.items()},
            features={name: value.flip(-1) if name in both else value for name, value in self.features.items()},
        )


@dataclass(frozen=True)
class LabelledLogps(Logps):
    """Summed log-probabilities of ``B`` completions that are each labelled good or bad, without a partner.

    Attributes:
        policy: ``(B,)`` log pi(y|x) in nats, summed over completion tokens.
        label: ``(B,)`` probability that the completion is desirable: 1 or 0 for a plain label.
        reference: ``(B,)`` log pi_ref(y|x), or ``None`` without a reference.
        length: ``(B,)`` number of completion tokens, end-of-text included.
        weight: ``(B,)`` non-negative weight of each completion; ``None`` for 1.
    """

    policy: Tensor
    label: Tensor
    reference: Tensor | None = None
    length: Tensor | None = None
    weight: Tensor | None = None

    PAIRS_PER_ROW: ClassVar[float] = 0.5
    POLICY: ClassVar[frozenset[str]] = frozenset({"policy"})

    @classmethod
    def of_batch(cls, batch: PreferenceBatch, policy_logps: Tensor, reference_logps: Tensor | None) -> LabelledLogps:
        """Return the labelled completions of a batch.

        Raises:
            ValueError: The batch does not have labels.
        """
        if batch.label is None:
            raise ValueError("a loss of labelled completions needs data with labels")
        label, weight = _in_precision_of(policy_logps, batch.label, batch.weight)
        return cls(
            policy=batch.per_completion(policy_logps)[0],
            label=label,
            reference=None if reference_logps is None else batch.per_completion(reference_logps)[0],
            length=batch.per_completion(batch.sequences.completion_length)[0],
            weight=weight,
        )

    @staticmethod
    def arrange(values: Tensor) -> Tensor:
        """Return ``(B,)`` numbers of the only completion of each row."""
        return values[0]


@dataclass(frozen=True)
class ListLogps(Logps):
    """Summed log-probabilities of ``n`` completions of ``B`` prompts, for best-of-n and ranked data.

    Attributes:
        policy: ``(B, n)`` log pi(y_i|x).
        mask: ``(B, n)`` true where a completion exists.
        order: ``(B, n)`` indices into the completions, best first.
        reference: ``(B, n)`` log pi_ref(y_i|x), or ``None``.
        weight: ``(B,)`` non-negative weight of each list; ``None`` for 1.
        preference: ``(B,)`` probability that ``order`` is right and not its reverse; ``None`` for 1. For a list of two
            it is the soft label of a pair.
    """

    policy: Tensor
    mask: Tensor
    order: Tensor
    reference: Tensor | None = None
    weight: Tensor | None = None
    preference: Tensor | None = None

    POLICY: ClassVar[frozenset[str]] = frozenset({"policy"})

    @classmethod
    def of_batch(cls, batch: PreferenceBatch, policy_logps: Tensor, reference_logps: Tensor | None) -> ListLogps:
        """Return the lists of a batch; a pair is a list of two."""
        mask = batch.mask().T
        preference, weight = _in_precision_of(policy_logps, batch.preference, batch.weight)
        return cls(
            policy=batch.per_completion(policy_logps).T,
            mask=mask,
            order=torch.arange(mask.shape[1], device=mask.device).expand_as(mask),
            reference=None if reference_logps is None else batch.per_completion(reference_logps).T,
            weight=weight,
            preference=preference,
        )

    @staticmethod
    def arrange(values: Tensor) -> Tensor:
        """Return ``(B, n)`` numbers of the completions of each list."""
        return values.T

    def best_first(self, per_completion: Iterable[str] = ()) -> ListLogps:
        """Return the lists with their completions in order: the best first, missing ones last and 0.

        Args:
            per_completion: Names of the features that have a number for each completion.
        """
        exists = self.mask.gather(-1, self.order)
        order = self.order.gather(-1, exists.long().argsort(dim=-1, descending=True, stable=True))
        mask = self.mask.gather(-1, order)

        def arranged(values: Tensor) -> Tensor:
            return values.gather(-1, order).masked_fill(~mask, 0)

        return replace(
            self,
            policy=arranged(self.policy),
            mask=mask,
            order=torch.arange(order.shape[-1], device=order.device).expand_as(order),
            reference=None if self.reference is None else arranged(self.reference),
            terms={name: arranged(value) for name, value in self.terms.items()},
            references={name: arranged(value) for name, value in self.references.items()},
            features=self.features | {name: arranged(self.features[name]) for name in per_completion},
        )
