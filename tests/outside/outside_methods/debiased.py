"""DPO with a trained head: what a number of each completion explains of a preference, the policy need not."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from spo.losses import Feature, PreferenceLoss
from spo.types import PairLogps


class DebiasedLoss(PreferenceLoss, nn.Module):
    """DPO whose margin has a learned multiple of the difference in a number, such as a grade of the style, added."""

    extra_metrics = ("debiased/weight",)

    def __init__(self, columns: tuple[str, str]) -> None:
        super().__init__()
        self.features = {"number": Feature(tuple(columns), default=0.0)}
        self.head = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        chosen, rejected = self.rewards(pair, alpha=alpha, beta=beta)
        numbers = pair.features["number"].to(self.head.weight)
        explained = self.head(numbers[:, :1] - numbers[:, 1:]).squeeze(-1)
        return -logsigmoid(chosen - rejected + explained)

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        weight = self.head.weight.detach().flatten().expand(len(pair))
        return super().metrics(pair, alpha=alpha, beta=beta) | {"debiased/weight": weight}
