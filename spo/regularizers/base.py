"""The base class of regularizers: a weighted divergence that builds its own part of the objective."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from spo.bounds import NonNegativeFloat, PositiveInt
from spo.objective import Divergence, PairDivergence, Run, SampleDivergence, SampleSettings
from spo.ops import Logits
from spo.types import Sequences

Weight = NonNegativeFloat | Literal["beta"]


class Regularizer(ABC):
    """A term ``weight * R`` added to the preference loss.

    To write one, derive from :class:`SampleRegularizer` if R is a mean over samples of the policy, or from
    :class:`PairRegularizer` if it is a mean over the responses of the batch, and write ``__call__``::

        class SquaredKL(SampleRegularizer):
            def __call__(self, policy_logits, reference_logits, sequences):
                return KL_ESTIMATORS["tokenwise"](policy_logits, reference_logits, sequences) ** 2

    For any other R derive from this class and let :meth:`part` return a :class:`~spo.objective.Divergence` of your own.
    A regularizer holds settings only: what changes during training, such as samples, belongs to its part. The rest of
    the package reads the attributes below and never the class.

    Attributes:
        weight: Coefficient of R; ``"beta"`` follows the beta schedule.
        adds_term: Whether there is a term at all.
        needs_reference: Whether R scores sequences with a reference model; stored log-probs are not enough.
        needs_reference_logits: Whether R reads the reference's logits on the pairs, in ``Divergence.on_pairs``.
        needs_enumeration: Whether R needs a data set whose responses can be enumerated.
        probe_metric: Metric of the probe that R at a validation is taken from, or ``None``.
        prompts: Prompts that R samples for: ``"train"``, ``"selection"``, ``"unlabeled"``, or a file.
    """

    adds_term: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    needs_reference_logits: ClassVar[bool] = False
    needs_enumeration: ClassVar[bool] = False
    probe_metric: ClassVar[str | None] = None
    prompts: str = "train"

    def __init__(self, weight: Weight) -> None:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight != "beta" and not (number and 0 <= weight < math.inf):
            raise ValueError(f"regularizer.weight must be a finite number >= 0 or 'beta', got {weight!r}")
        self.weight = weight

    @abstractmethod
    def part(self, run: Run) -> Divergence:
        """Build the part of the objective for a run."""

    @property
    def follows_beta(self) -> bool:
        """Return whether the beta schedule is the coefficient of R."""
        return self.weight == "beta"

    def weight_at(self, beta: float) -> float:
        """Return the coefficient of R while the beta schedule is at ``beta``."""
        return beta if self.weight == "beta" else float(self.weight)

    def kl_weight(self, beta: float) -> float | None:
        """Return the coefficient of KL(policy || reference) over all responses that the term amounts to.

        With it the optimum of the objective is known. ``None`` means that the term is not a multiple of that KL.
        """
        return None


class NoRegularizer(Regularizer):
    """The preference loss alone."""

    adds_term: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(weight=0.0)

    def part(self, run: Run) -> Divergence:
        """Build a part without terms."""
        return Divergence(run, self.weight_at)

    def kl_weight(self, beta: float) -> float:
        """Return 0: there is no KL."""
        return 0.0


class PairRegularizer(Regularizer):
    """A divergence on the responses of the batch, chosen and rejected. Subclasses write ``__call__``."""

    needs_reference_logits: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
        """Return ``(N,)`` R of each sequence, in nats.

        Args:
            policy_logits: ``(M, V)`` at the ``M`` completion tokens of ``sequences``.
            reference_logits: ``(M, V)`` at the same tokens, without gradient.
            sequences: ``N`` responses with their prompts.
        """

    def part(self, run: Run) -> PairDivergence:
        """Build the part on the pairs."""
        return PairDivergence(run, self.weight_at, self)


class SampleRegularizer(Regularizer):
    """A divergence on samples of the policy, drawn from time to time and reused. Subclasses write ``__call__``.

    The samples in the buffer are stale at a validation. A subclass whose R the probe estimates on fresh samples sets
    ``probe_metric``; without it ``val/loss`` omits R.

    Args:
        weight: Coefficient of R, or ``"beta"`` to follow the beta schedule.
        refresh_every: Optimizer steps between two drawings of samples.
        num_samples: Sequences in the buffer, one per prompt drawn, over all processes.
        batch_size: Buffered sequences used in each optimizer step, over all processes.
        max_new_tokens: Length limit of a sample, in tokens.
        prompts: Prompts to sample for: those of the split ``"train"`` or ``"selection"``, those without pairs
            (``"unlabeled"``), or a file.

    Raises:
        ValueError: A count is not positive, or ``batch_size`` exceeds ``num_samples``.
    """

    def __init__(
        self,
        weight: Weight,
        refresh_every: PositiveInt,
        num_samples: PositiveInt,
        batch_size: PositiveInt,
        max_new_tokens: PositiveInt,
        prompts: str = "train",
    ) -> None:
        super().__init__(weight)
        self.prompts = prompts
        self.settings = SampleSettings(refresh_every, num_samples, batch_size, max_new_tokens)
        for name, value in vars(self.settings).items():
            if value < 1:
                raise ValueError(f"regularizer.{name} must be at least 1, got {value}")
        if batch_size > num_samples:
            raise ValueError(
                f"regularizer.batch_size ({batch_size}) exceeds regularizer.num_samples ({num_samples}): "
                "a step cannot use more buffered samples than there are"
            )

    @abstractmethod
    def __call__(self, policy_logits: Logits, reference_logits: Logits, sequences: Sequences) -> Tensor:
        """Return ``(N,)`` R of each sequence, see :meth:`PairRegularizer.__call__`."""

    def part(self, run: Run) -> SampleDivergence:
        """Build the part that owns the samples."""
        return SampleDivergence(run, self.weight_at, self, self.settings, self.probe_metric)
