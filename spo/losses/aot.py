"""Alignment via Optimal Transport, on pairs and on unpaired completions."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss, rows_where
from spo.losses.margins import both_log_ratios, policy_margin, reference_margin
from spo.types import PairLogps


class AOTLoss(PreferenceLoss):
    r"""AOT, arXiv:2406.05882: the policy's margins dominate those of the reference in distribution.

    .. math:: L = \frac{1}{B} \sum_k -\log\sigma(\beta [a_{(k)} - b_{(k)}])

    where a and b are ``(B,)`` numbers in sorted order: the margins of the policy and of the reference for pairs, or the
    log-ratios of chosen and of rejected with ``unpaired``, where no completion has a partner. All pairs of an optimizer
    step are sorted together; with one pair the loss is DPO. The loss of a pair is that of its a. With a soft label,
    the likelier completion is the chosen one, and the comparison is mixed with its opposite, as label smoothing does.

    Args:
        unpaired: Compare the log-ratios of chosen and rejected completions without their pairing.
        label_smoothing: Assumed share of flipped comparisons, in [0, 0.5), as in conservative DPO.

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 0.5).
    """

    full_batch = True
    reads_soft_labels = True
    no_optimum = "it compares order statistics of a step, whose ties have corners"

    def __init__(self, unpaired: bool = False, label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0) -> None:
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        self.unpaired, self.label_smoothing = unpaired, label_smoothing

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        if pair.preference is not None:
            pair = rows_where(pair.preference < 0.5, pair.swapped(), pair)
        above, below = both_log_ratios(pair) if self.unpaired else (policy_margin(pair), reference_margin(pair))
        place = above.argsort(stable=True).argsort()
        logit = beta * (above - below.sort(stable=True).values[place])
        right: float | Tensor = 1 - self.label_smoothing
        if pair.preference is not None:
            right = right * pair.preference + self.label_smoothing * (1 - pair.preference)
        return -right * logsigmoid(logit) - (1 - right) * logsigmoid(-logit)
