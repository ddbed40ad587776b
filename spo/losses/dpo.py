"""Direct Preference Optimization."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss
from spo.losses.margins import log_ratio_margin
from spo.types import PairLogps


class DPOLoss(PreferenceLoss):
    r"""DPO, arXiv:2305.18290, eq. 7; with label smoothing it is conservative DPO.

    .. math:: L = -(1-\epsilon) \log\sigma(\beta h) - \epsilon \log\sigma(-\beta h), \quad
              h = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}

    where y_w and y_l are the chosen and the rejected completion, pi_ref is the reference, log pi(y|x) is the *summed*
    log-probability, ``(B,)``, beta > 0 is the temperature, and epsilon is the label smoothing.

    With a soft label p, the probability that chosen is better, the weight 1 - epsilon of the first term becomes
    p (1 - epsilon) + (1 - p) epsilon.

    Args:
        label_smoothing: Assumed share epsilon of flipped labels, in [0, 0.5).

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 0.5).
    """

    def __init__(self, label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0) -> None:
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        margin = log_ratio_margin(pair)
        losses = -logsigmoid(beta * margin)
        if not self.label_smoothing:
            return losses
        return (1 - self.label_smoothing) * losses - self.label_smoothing * logsigmoid(-beta * margin)

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor | None:
        """Return log pi_ref + r / beta, normalized (arXiv:2305.18290, eq. 4), or ``None`` with label smoothing.

        No reward explains smoothed labels: with three or more responses, no policy fits all pairs.
        """
        return None if self.label_smoothing else (reference_logps + rewards / beta).log_softmax(-1)
