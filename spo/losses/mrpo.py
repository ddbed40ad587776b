"""Multi-Reference Preference Optimization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import Fraction, NonNegativeFloat
from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_policy_logps
from spo.types import PairLogps

SMALLEST_GAP = 1e-6
"""Number in nats that the official code adds to the denominator of adaptive weights."""


class MRPOLoss(PreferenceLoss):
    r"""MRPO, arXiv:2405.16388: DPO with the weighted harmonic mean of several references.

    .. math:: L = -\log\sigma\left(\beta \left[\log\frac{\pi(y_w|x)}{\pi_m(y_w|x)}
                  - \log\frac{\pi(y_l|x)}{\pi_m(y_l|x)}\right]\right), \quad
              \pi_m = \left(\sum_k \frac{a_k}{\pi_k}\right)^{-1}

    where log-probabilities are *summed*, ``(B,)``, and pi_k are the main reference and the further ones. Adaptive
    weights are a_k = abs(g_k) / sum_j abs(g_j), where g_k is the log-prob of y_w under reference k minus that of y_l.
    Before the mean, each further reference l is clipped to (1 +- c) times the log-prob of the main one. The room c is
    ``clip`` for both completions together, shared in proportion to the mean log-prob of the two references.

    Args:
        references: Names of the further references; each needs a model in ``extra_references.NAME``.
        weight: Weight of the further reference; ``None`` for adaptive weights, which several of them need.
        clip: Room of the clipping, relative to the log-prob of the main reference. 0 is DPO.
        adaptive_clip: Share ``clip`` between the two completions. If false, each has all of it.
        index: ``own`` lets the weight of a reference multiply its own inverse. ``code`` exchanges the weights of the
            two references, as the official code does.

    Raises:
        ValueError: A number is out of range, there is no further reference, or the options do not fit several.
    """

    def __init__(
        self,
        references: Sequence[str] = ("extra",),
        weight: Fraction | None = None,
        clip: NonNegativeFloat = 0.1,
        adaptive_clip: bool = True,
        index: Literal["own", "code"] = "own",
    ) -> None:
        is_text = isinstance(references, str) or not all(isinstance(name, str) for name in references)
        if is_text or not references or len(set(references)) < len(references):
            raise ValueError("references must be a list of different names, at least one, such as [extra]")
        if index not in ("own", "code"):
            raise ValueError(f"index must be own or code, got {index}")
        if len(references) > 1 and (weight is not None or index == "code"):
            raise ValueError("several further references need weight=null and index=own")
        if (weight is not None and not 0 <= weight <= 1) or not clip >= 0:
            raise ValueError(f"weight must be in [0, 1] and clip >= 0, got weight={weight}, clip={clip}")
        self.extra_references = tuple(references)
        self.weight, self.clip, self.adaptive_clip, self.index = weight, clip, adaptive_clip, index

    def combined(self, pair: PairLogps) -> Tensor:
        """Return the ``(2, B)`` log-probs of both completions under the combined reference.

        Raises:
            ValueError: A reference log-probability is missing.
        """
        if pair.reference_chosen is None or pair.reference_rejected is None:
            raise ValueError("MRPO needs reference_chosen and reference_rejected")
        base = torch.stack([pair.reference_chosen, pair.reference_rejected])
        others = torch.stack([pair.references[name] for name in self.extra_references])
        weights = self._weights(base, others)
        logps = torch.cat([self._clipped(others, base), base[None]])
        # A weight of zero leaves its reference out, without a gradient that is not a number.
        parts = (weights.log()[:, None] - logps).masked_fill(weights[:, None] == 0, -torch.inf)
        return -parts.logsumexp(0)

    def _weights(self, base: Tensor, others: Tensor) -> Tensor:
        """Return ``(K, B)`` weights of the further references, and of the main one last."""
        if self.weight is not None:
            further = torch.full_like(others[:, 0], self.weight)
        else:
            gaps = (others[:, 0] - others[:, 1]).abs()
            further = gaps / (gaps.sum(0) + (base[0] - base[1]).abs() + SMALLEST_GAP)
        weights = torch.cat([further, 1 - further.sum(0, keepdim=True)])
        return weights.flip(0) if self.index == "code" else weights

    def _clipped(self, others: Tensor, base: Tensor) -> Tensor:
        """Return ``(K - 1, 2, B)`` log-probs of the further references near the main one."""
        room = torch.full_like(others, self.clip)
        if self.adaptive_clip:
            size = ((others + base) / 2).abs()
            of_chosen = self.clip * size[:, 0] / size.sum(1).clamp(min=SMALLEST_GAP)
            room = torch.stack([of_chosen, self.clip - of_chosen], 1)
        return others.clamp((1 + room) * base, (1 - room) * base)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = both_policy_logps(pair)
        reference = self.combined(pair)
        return -logsigmoid(beta * (chosen - rejected - (reference[0] - reference[1])))

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return beta times the log-ratio to the combined reference."""
        chosen, rejected = both_policy_logps(pair)
        reference = self.combined(pair)
        return beta * (chosen - reference[0]), beta * (rejected - reference[1])
