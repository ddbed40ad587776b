"""Soft Preference Learning."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss
from spo.losses.margins import policy_margin, reference_margin
from spo.types import PairLogps


class SPLLoss(PreferenceLoss):
    r"""SPL, arXiv:2511.08594: DPO with separate weights of entropy and of cross-entropy to the reference.

    .. math:: L = -\log\sigma\left(\alpha \left[\log\pi(y_w|x) - \log\pi(y_l|x)\right]
                  - \beta \left[\log\pi_{ref}(y_w|x) - \log\pi_{ref}(y_l|x)\right]\right)

    where log-probabilities are *summed*, ``(B,)``, alpha is the weight of the entropy, and beta that of the
    cross-entropy. With alpha = beta the loss is DPO. With beta = 0 it is alpha times the preference term of SPO.
    """

    uses_alpha = True

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        return -logsigmoid(alpha * policy_margin(pair) - beta * reference_margin(pair))

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return alpha log pi - beta log pi_ref, whose difference is the logit of the loss."""
        policy_margin(pair), reference_margin(pair)  # They raise if a log-probability is missing.
        assert pair.policy_rejected is not None
        assert pair.reference_chosen is not None and pair.reference_rejected is not None
        chosen = alpha * pair.policy_chosen - beta * pair.reference_chosen
        return chosen, alpha * pair.policy_rejected - beta * pair.reference_rejected

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor:
        """Return log softmax((r + beta log pi_ref) / alpha): the logit of each pair is its difference in reward."""
        return ((rewards + beta * reference_logps) / alpha).log_softmax(-1)
