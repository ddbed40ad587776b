"""Self-supervised Preference Optimization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from spo.bounds import NonNegativeFloat
from spo.losses.declarations import Ids, Role, RoleInputs, Term
from spo.losses.dpo import DPOLoss
from spo.losses.heads import StateHead
from spo.losses.key_phrases import without_phrases
from spo.ops import sum_per_sequence
from spo.types import PairLogps

if TYPE_CHECKING:
    from spo.objective import ScoredBatch

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Damaged(Role):
    """A completion of the row without a share of its key phrases.

    Attributes:
        rank: Rank of the completion, 0 for the chosen one.
        share: Share of the phrases that are deleted.
    """

    rank: int
    share: float

    def tokens(self, rows: RoleInputs) -> Sequence[Ids]:
        """Return the tokens of the damaged completions."""
        return rows.edited(self.rank, partial(without_phrases, share=self.share))


class SelfSupervisedPOLoss(DPOLoss, nn.Module):
    r"""Self-supervised PO, arXiv:2409.17791: DPO, and a classification of how much of a completion was deleted.

    .. math:: L = -\log\sigma(\beta h) + \gamma \left[D(y_w) + D(y_l)\right], \quad
              D(y) = -\frac{1}{K} \sum_{k=0}^{K-1} \log \mathrm{softmax}(W s(y^k) + b)_k

    where h is the margin of DPO, ``(B,)``, y^k is the completion y without the share k/K of its key phrases, and s is
    the mean of the policy's last hidden states over the completion. Its gradient reaches the policy. RAKE finds the
    phrases, the most important of which are deleted first. A version that is the same as the one before it, because the
    text has too few phrases, is left out of the mean. The versions are further completions in the batch of the pair,
    so the policy is run once.

    This is a reconstruction: the equations of the paper were not read, and its repository has no code. K, gamma, the
    mean of the states and the linear layer are ours.

    Args:
        gamma: Weight of the classification; 0 is DPO.
        versions: Number K of versions of a completion, with the whole one.

    Raises:
        ValueError: ``gamma`` is negative, or there are fewer than two versions.
    """

    def __init__(self, gamma: NonNegativeFloat = 0.1, versions: Annotated[int, Ge(2)] = 4) -> None:
        nn.Module.__init__(self)
        super().__init__()
        if not gamma >= 0 or versions < 2:
            raise ValueError(f"gamma must be >= 0 and versions at least 2, got {gamma} and {versions}")
        self.gamma, self.versions = gamma, versions
        self.degree_head: StateHead | None = None
        if gamma == 0:
            return
        self.extra_completions = {
            f"{side}_{k}": Damaged(rank, k / versions) for rank, side in enumerate(SIDES) for k in range(1, versions)
        }
        self.terms = {"degree": Term(self.degree_losses, needs_policy_states=True)}
        self.extra_metrics = ("self_supervised_po/degree",)

    def fit_width(self, width: int) -> None:
        """Make the layer that classifies the versions."""
        if self.gamma > 0:
            self.degree_head = StateHead(width, self.versions)

    def degree_losses(self, scored: ScoredBatch) -> Tensor:
        """Return the mean cross-entropy D of the versions of each completion, ``(2, B)``.

        Args:
            scored: Scored batch with the hidden states of the policy.

        Raises:
            ValueError: The width of the states was not given by :meth:`fit_width`.
        """
        if self.degree_head is None:
            raise ValueError("Self-supervised PO needs the width of the policy's hidden states: call fit_width(width)")
        batch = scored.batch
        # The layer is linear, so the mean of its outputs is its output for the mean.
        sums = sum_per_sequence(self.degree_head(scored.policy_states), batch.sequences)
        losses = -(sums / batch.sequences.completion_length[:, None]).log_softmax(-1)
        whole = batch.per_completion(torch.arange(len(losses), device=losses.device))
        found = [self._mean(losses, batch.extra, side, own) for side, own in zip(SIDES, whole, strict=False)]
        # Further completions of a ranked list do not have versions, and the loss of pairs does not read them.
        return nn.functional.pad(torch.stack(found), (0, 0, 0, len(whole) - len(found)))

    def _mean(self, losses: Tensor, extra: Mapping[str, Tensor], side: str, whole: Tensor) -> Tensor:
        """Return the ``(B,)`` mean over the versions of a completion, from ``(N, K)`` losses of each degree.

        Args:
            losses: Loss of each sequence of the batch, if it had each of the degrees.
            extra: ``(B,)`` places of the further completions among the sequences, by name.
            side: Name of the completion.
            whole: ``(B,)`` places of the whole completions among the sequences.
        """
        places = torch.stack([whole, *(extra[f"{side}_{k}"] for k in range(1, self.versions))])
        degrees = torch.arange(self.versions, device=places.device)[:, None]
        differs = torch.cat([torch.ones_like(places[:1], dtype=torch.bool), places[1:] != places[:-1]])
        return (losses[places, degrees] * differs).sum(0) / differs.sum(0)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        losses = super().of_pairs(pair, alpha=alpha, beta=beta)
        return losses + self.gamma * pair.terms["degree"].sum(0) if self.gamma > 0 else losses

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of every loss, and the mean of D over both completions."""
        found = super().metrics(pair, alpha=alpha, beta=beta)
        return found | {"self_supervised_po/degree": pair.terms["degree"].mean(0)} if self.gamma > 0 else found

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor | None:
        """Return the optimum of DPO without the classification, whose gradient reaches the policy, else ``None``."""
        return super().optimum(rewards, reference_logps, alpha, beta, lengths=lengths) if self.gamma == 0 else None
