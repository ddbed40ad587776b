"""Binary Classifier Optimization."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from spo.losses.base import LabelledLoss
from spo.types import LabelledLogps


class BCOLoss(LabelledLoss, nn.Module):
    r"""BCO, arXiv:2404.04656: a classifier of desirable completions whose logit is the implicit reward.

    .. math:: L = -\log\sigma(r - \delta) \text{ if } y \text{ is desirable, else } -\log\sigma(-(r - \delta)), \quad
              r = \beta \log\frac{\pi(y|x)}{\pi_{ref}(y|x)}

    where log-probabilities are *summed*, ``(B,)``, and delta is the mean reward of all completions that training has
    seen, those of the present step included; it is a buffer, without gradient. Pairs are read as two completions each,
    so the mean loss is half that of TRL's ``bco_pair``.

    Args:
        shift: Subtract delta. TRL's ``bco_pair`` does not.
    """

    extra_metrics = ("bco/shift",)

    def __init__(self, shift: bool = True) -> None:
        super().__init__()
        self.shift = shift
        self.total: Tensor
        self.count: Tensor
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update_statistics(self, logps: LabelledLogps) -> None:
        """Add the log-ratios of a step to the running mean."""
        ratios = self._ratios(logps)
        self.total += ratios.sum()
        self.count += len(ratios)

    def _ratios(self, logps: LabelledLogps) -> Tensor:
        if logps.reference is None:
            raise ValueError("BCO needs the reference")
        return logps.policy - logps.reference

    def mean_ratio(self, logps: LabelledLogps) -> Tensor:
        """Return the mean log-ratio so far, a scalar in nats; delta is beta times it."""
        mean = (self.total / self.count.clamp(min=1)).to(logps.policy)
        return mean if self.shift else torch.zeros_like(mean)

    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each completion."""
        logit = beta * (self._ratios(logps) - self.mean_ratio(logps))
        return -logsigmoid(torch.where(logps.label == 1, logit, -logit))

    def metrics(self, logps: LabelledLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of every loss, and delta."""
        found = super().metrics(logps, alpha=alpha, beta=beta)
        return found | {"bco/shift": beta * self.mean_ratio(logps).expand(len(logps))}
