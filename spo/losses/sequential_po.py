"""Sequential Preference Optimization: one round of several, each for one dimension of preference."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss
from spo.losses.declarations import Feature
from spo.losses.margins import log_ratio_margin
from spo.types import PairLogps

EARLIER_REWARD = "earlier_reward"
"""Name of the feature that holds E(y)."""


class SequentialPOLoss(PreferenceLoss):
    r"""One round of Sequential Preference Optimization, arXiv:2405.12739.

    .. math:: L_n = -\log\sigma\left(\beta \left[\log\frac{\pi(y_w|x)}{\pi_{n-1}(y_w|x)}
                    - \log\frac{\pi(y_l|x)}{\pi_{n-1}(y_l|x)}\right] - \left[E(y_w) - E(y_l)\right]\right), \quad
              E(y) = \sum_{i<n} c_i R_i(y)

    where the reference pi_{n-1} is the policy of the round before, log-probabilities are *summed*, ``(B,)``, and E is
    the weighted sum of the implicit rewards of earlier rounds, constant in the gradient. It is read from the columns
    ``chosen_earlier_reward`` and ``rejected_earlier_reward``; rows without them are of the first round, which is DPO.
    With Bradley-Terry labels of a reward r_n it leads to pi_{n-1} exp((r_n + E) / beta), so c_i > 0 keeps what round i
    has aligned. The loss is a reconstruction: it is our derivation from the constrained problem, and the paper's
    equation was not read.
    """

    features: Mapping[str, Feature] = {EARLIER_REWARD: Feature(EARLIER_REWARD, each=True, default=0.0)}

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        margin = log_ratio_margin(pair)
        earlier = pair.features[EARLIER_REWARD].to(margin)
        return -logsigmoid(beta * margin - (earlier[:, 0] - earlier[:, 1]))
