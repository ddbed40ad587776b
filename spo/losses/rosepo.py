"""RosePO: DPO with a probability of a flipped label for each pair."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss
from spo.losses.declarations import Feature
from spo.losses.margins import log_ratio_margin
from spo.types import PairLogps


class RosePOLoss(PreferenceLoss):
    r"""RosePO, arXiv:2410.12519: label smoothing whose strength is that of the pair.

    .. math:: L = -(1-\epsilon_i) \log\sigma(\beta h_i) - \epsilon_i \log\sigma(-\beta h_i)

    where h is the margin of DPO, ``(B,)``, and epsilon_i is the probability that the label of pair i is flipped, read
    from the column ``flip_probability``. The place of epsilon_i in the loss is a reconstruction from the abstract and a
    note on the paper; its equation was not read.
    """

    features: Mapping[str, Feature] = {"flip_probability": Feature("flip_probability")}

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        logit = beta * log_ratio_margin(pair)
        flipped = pair.features["flip_probability"].to(logit)
        return -(1 - flipped) * logsigmoid(logit) - flipped * logsigmoid(-logit)
