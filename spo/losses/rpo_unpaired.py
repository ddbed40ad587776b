"""Relative Preference Optimization on completions with labels, without partners."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.bounds import PositiveFloat
from spo.losses.base import LabelledLoss
from spo.losses.embedders import Embedder
from spo.losses.rpo import prompt_embedding, prompt_weights
from spo.types import LabelledLogps


class RPOUnpairedLoss(LabelledLoss):
    r"""RPO on M desirable and N other completions, arXiv:2402.10958.

    .. math:: L = \frac{1}{MN} \sum_{ij} -\log\sigma\left(\beta\, w_{ij} \left[u(y_i) - u(y_j)\right]\right), \quad
              w_{ij} = \mathrm{softmax}_j\left(-\frac{1 - \cos(e_i, e_j)}{\tau}\right)

    where i runs over desirable completions and j over the others, u is the *summed* log-ratio of policy and reference,
    ``(B,)``, and e is the embedding of a prompt. The two completions of a comparison share its loss equally, in numbers
    whose mean over all M + N completions of the step is L. A step with one kind of label has loss 0.

    Args:
        temperature: Temperature tau of the likeness of prompts.
        embedder: Function that embeds prompts of rows without the column ``prompt_embedding``. By default, hashed
            words, which need no model.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    full_batch = True

    def __init__(self, temperature: PositiveFloat = 0.5, embedder: Embedder | None = None) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.features = {"prompt_embedding": prompt_embedding(embedder)}

    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each completion."""
        if logps.reference is None:
            raise ValueError("RPO needs the reference")
        ratios, is_good = logps.policy - logps.reference, logps.label == 1
        embedding = logps.features["prompt_embedding"].to(ratios)
        good, bad = is_good.nonzero().squeeze(-1), (~is_good).nonzero().squeeze(-1)
        losses = torch.zeros_like(ratios)
        if not (len(good) and len(bad)):
            return losses + 0 * ratios  # with a gradient, which is zero
        weights = prompt_weights(embedding[good], embedding[bad], self.temperature)
        each = -logsigmoid(beta * weights * (ratios[good, None] - ratios[bad])) / 2
        share = len(ratios) / (len(good) * len(bad))
        return losses.index_add(0, good, share * each.sum(1)).index_add(0, bad, share * each.sum(0))
