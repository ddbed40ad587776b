"""Relative Preference Optimization: each chosen completion against the rejected ones of all prompts of a step."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from spo.bounds import PositiveFloat
from spo.losses.base import PreferenceLoss
from spo.losses.declarations import Feature
from spo.losses.embedders import Embedder, HashedWords
from spo.losses.margins import both_log_ratios
from spo.types import PairLogps


class RPOLoss(PreferenceLoss):
    r"""RPO on pairs, arXiv:2402.10958.

    .. math:: L_i = \frac{1}{M} \sum_j -\log\sigma\left(\beta\, w_{ij} \left[u(y_{w,i}) - u(y_{l,j})\right]\right),
              \quad
              w_{ij} = \mathrm{softmax}_j\left(-\frac{1 - \cos(e_i, e_j)}{\tau}\right)

    where u is the *summed* log-ratio of policy and reference, ``(B,)``, and e_i is the embedding of prompt i. All M
    pairs of an optimizer step are compared, whatever the micro-batches and devices. The weights of a row sum to 1, so
    the slope shrinks like 1/M: a beta belongs to a batch size.

    Args:
        temperature: Temperature tau of the likeness of prompts.
        embedder: Function that embeds prompts of rows without the column ``prompt_embedding``. By default, hashed
            words, which need no model.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    full_batch = True
    no_optimum = "it contrasts completions of different prompts of a step"

    def __init__(self, temperature: PositiveFloat = 0.5, embedder: Embedder | None = None) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.features = {"prompt_embedding": prompt_embedding(embedder)}

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair: the mean over the row of its chosen completion."""
        chosen, rejected = both_log_ratios(pair)
        embedding = pair.features["prompt_embedding"].to(chosen)
        weights = prompt_weights(embedding, embedding, self.temperature)
        return -logsigmoid(beta * weights * (chosen[:, None] - rejected)).mean(-1)


def prompt_embedding(embedder: Embedder | None) -> Feature:
    """Return the feature with the embedding of a prompt, from its column or else from an embedder."""
    made_by = HashedWords() if embedder is None else embedder
    return Feature("prompt_embedding", size=made_by.size, make=made_by)


def prompt_weights(rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """Return ``(M, N)`` weights of the prompts of the columns for each row, which sum to 1.

    Args:
        rows: ``(M, D)`` embeddings.
        columns: ``(N, D)`` embeddings.
        temperature: Temperature of the likeness.
    """
    likeness = normalize(rows, dim=-1) @ normalize(columns, dim=-1).T
    return ((likeness - 1) / temperature).softmax(-1)
