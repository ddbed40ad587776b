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
    whose mean over all M + N completions of the step is L. With soft labels, a comparison counts by the probability
    that i is desirable and j is not, and M, N and the softmax over j count completions by these probabilities. A step
    with one kind of label has loss 0.

    Args:
        embedder: Function that embeds prompts of rows without the column ``prompt_embedding``.
        temperature: Temperature tau of the likeness of prompts.

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    full_batch = True
    reads_soft_labels = True

    def __init__(self, temperature: PositiveFloat = 0.5, *, embedder: Embedder) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.features = {"prompt_embedding": prompt_embedding(embedder)}

    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each completion."""
        if logps.reference is None:
            raise ValueError("RPO needs the reference")
        ratios, good = logps.policy - logps.reference, logps.label
        embedding = logps.features["prompt_embedding"].to(ratios)
        itself = torch.eye(len(good), dtype=torch.bool, device=good.device)
        share = (good[:, None] * (1 - good)).masked_fill(itself, 0)
        # Without both kinds of label there is nothing to compare: all shares are 0, and so is the gradient.
        share = share / share.sum().clamp(min=torch.finfo(share.dtype).tiny)
        weights = prompt_weights(embedding, self.temperature, ((1 - good) * ~itself).to(ratios))
        each = -share * logsigmoid(beta * weights * (ratios[:, None] - ratios)) / 2
        return len(ratios) * (each.sum(1) + each.sum(0))
