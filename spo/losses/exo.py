"""Efficient Exact Optimization, on pairs."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from annotated_types import Gt, Lt
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss
from spo.losses.margins import log_ratio_margin
from spo.types import PairLogps

OFFICIAL_REJECTED_LOG_TARGET = -10.0
"""Log-target in nats of the rejected completion in the official code, which does not normalize the targets."""


class EXOLoss(PreferenceLoss):
    r"""EXO on pairs (EXO-pref), arXiv:2402.00856: the reverse KL from the policy's choice to the label's.

    .. math:: L = q_w (\log q_w - \log p_w) + q_l (\log q_l - \log p_l), \quad
              q_w = \sigma(\beta h), \quad q_l = 1 - q_w

    where h is the margin of DPO, ``(B,)``, and the targets are p_w = 1 - epsilon and p_l = epsilon. With hard targets
    (epsilon = 0) L would be infinite.

    Args:
        label_smoothing: Target epsilon of the rejected completion, in (0, 0.5).
        targets: ``smoothed`` for the targets above (TRL), or ``official`` for the log-targets 0 and -10 of the official
            code, which do not sum to 1 and do not read ``label_smoothing``.

    Raises:
        ValueError: ``label_smoothing`` is outside (0, 0.5), or ``targets`` is unknown.
    """

    def __init__(
        self,
        label_smoothing: Annotated[float, Gt(0), Lt(0.5)] = 1e-3,
        targets: Literal["smoothed", "official"] = "smoothed",
    ) -> None:
        if not 0 < label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in (0, 0.5), got {label_smoothing}")
        if targets not in ("smoothed", "official"):
            raise ValueError(f"targets must be smoothed or official, got {targets}")
        self.log_targets = (math.log1p(-label_smoothing), math.log(label_smoothing))
        if targets == "official":
            self.log_targets = (0.0, OFFICIAL_REJECTED_LOG_TARGET)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        logit, (target_chosen, target_rejected) = beta * log_ratio_margin(pair), self.log_targets
        chosen, rejected = logsigmoid(logit), logsigmoid(-logit)
        return chosen.exp() * (chosen - target_chosen) + rejected.exp() * (rejected - target_rejected)
