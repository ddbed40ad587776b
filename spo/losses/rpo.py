"""Relative Preference Optimization: each chosen completion against the rejected ones of all prompts of a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from spo.bounds import PositiveFloat
from spo.losses.base import PreferenceLoss
from spo.losses.declarations import Feature
from spo.losses.embedders import Embedder
from spo.losses.margins import both_log_ratios
from spo.types import PairLogps


class RPOLoss(PreferenceLoss):
    r"""RPO on pairs, arXiv:2402.10958.

    .. math:: L_i = \frac{1}{M} \sum_j -\log\sigma\left(\beta\, w_{ij} \left[u(y_{w,i}) - u(y_{l,j})\right]\right),
              \quad
              w_{ij} = \mathrm{softmax}_j\left(-\frac{1 - \cos(e_i, e_j)}{\tau}\right)

    where u is the *summed* log-ratio of policy and reference, ``(B,)``, and e_i is the embedding of prompt i. All M
    pairs of an optimizer step are compared, whatever the micro-batches and devices. The weights of a row sum to 1, so
    the slope shrinks like 1/M: a beta belongs to a batch size. Soft labels give the expectation over independent labels
    of all pairs.

    Args:
        embedder: Function that embeds prompts of rows without the column ``prompt_embedding``.
        temperature: Temperature tau of the likeness of prompts.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    full_batch = True
    reads_soft_labels = True
    no_optimum = "it contrasts completions of different prompts of a step"

    def __init__(self, temperature: PositiveFloat = 0.5, *, embedder: Embedder) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.features = {"prompt_embedding": prompt_embedding(embedder)}

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair: the mean over the row of its chosen completion."""
        chosen, rejected = both_log_ratios(pair)
        embedding = pair.features["prompt_embedding"].to(chosen)
        weights = prompt_weights(embedding, self.temperature)

        def compared(better: Tensor, worse: Tensor) -> Tensor:
            return -logsigmoid(beta * weights * (better[:, None] - worse))

        if pair.preference is None:
            return compared(chosen, rejected).mean(-1)
        right, wrong = pair.preference, 1 - pair.preference
        # The better completion of row i and the worse one of column j, for each outcome of the two labels.
        losses = right[:, None] * (right * compared(chosen, rejected) + wrong * compared(chosen, chosen))
        losses = losses + wrong[:, None] * (right * compared(rejected, rejected) + wrong * compared(rejected, chosen))
        own = right * compared(chosen, rejected).diagonal() + wrong * compared(rejected, chosen).diagonal()
        # A pair has one label, which turns both of its completions.
        return torch.where(torch.eye(len(own), dtype=torch.bool, device=own.device), own, losses).mean(-1)


def prompt_embedding(embedder: Embedder) -> Feature:
    """Return the feature with the embedding of a prompt, from its column or else from an embedder.

    Raises:
        ValueError: ``embedder`` is not one.
    """
    if not (callable(embedder) and hasattr(embedder, "size")):
        raise ValueError(f"embedder must be a function with a size, such as spo.losses.HashedWords, got {embedder!r}")
    return Feature("prompt_embedding", size=embedder.size, make=embedder)


def prompt_weights(embedding: Tensor, temperature: float, counted: Tensor | None = None) -> Tensor:
    """Return ``(B, B)`` weights of the prompts of the columns for each row, which sum to 1.

    Args:
        embedding: ``(B, D)`` embedding of each prompt.
        temperature: Temperature of the likeness.
        counted: Factors of the weights before they are divided by their sum, ``(B, B)``; ``None`` for 1.
    """
    direction = normalize(embedding, dim=-1)
    likeness = (direction @ direction.T - 1) / temperature
    return (likeness if counted is None else likeness + counted.log()).softmax(-1).nan_to_num(0)
