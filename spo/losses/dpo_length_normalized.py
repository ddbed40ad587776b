"""DPO on log-ratios per token."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.losses.base import PreferenceLoss
from spo.losses.margins import both_log_ratios, per_token
from spo.losses.normalizer import normalized_per_token
from spo.types import PairLogps


class LengthNormalizedDPOLoss(PreferenceLoss):
    r"""Length-normalized DPO, the loss of Tulu 3, arXiv:2411.15124.

    .. math:: L = -\log\sigma\left(\beta \left[\frac{u_w}{|y_w|} - \frac{u_l}{|y_l|}\right]\right), \quad
              u = \log\frac{\pi(y|x)}{\pi_{ref}(y|x)}

    where log-probabilities are summed over the tokens of a completion, and u is divided by their number, ``(B,)``.
    """

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` loss of each pair."""
        chosen, rejected = per_token(pair, both_log_ratios(pair))
        return -logsigmoid(beta * (chosen - rejected))

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor | None]:
        """Return beta times the log-ratio per token."""
        chosen, rejected = per_token(pair, both_log_ratios(pair))
        return beta * chosen, beta * rejected

    def optimum(
        self, rewards: Tensor, reference_logps: Tensor, alpha: float, beta: float, *, lengths: Tensor | None = None
    ) -> Tensor:
        """Return log pi_ref + |y| (r / beta + c): each pair is least where beta u / |y| differs as r does.

        Raises:
            ValueError: ``lengths`` is ``None``.
        """
        if lengths is None:
            raise ValueError("the optimum of length-normalized DPO needs the lengths of the responses")
        return normalized_per_token(reference_logps + lengths * rewards / beta, lengths)
