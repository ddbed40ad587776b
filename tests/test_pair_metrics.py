"""The final evaluation scores the test pairs as the last validation scored the selection pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spo.errors import UserError
from spo.evaluation.pair_metrics import Scoring, pair_metrics
from spo.losses import DPOLoss, Loss, PreferenceLoss, Term, WeightedSPOLoss
from spo.models import FrozenReference
from spo.regularizers import LocalKL, NoRegularizer, Regularizer
from spo.types import PairLogps
from tests.helpers import FAST, PAD, PLAIN, make_data, make_module, make_trainer, random_pairs, tiny_llama


class Unreferenced(PreferenceLoss):
    """A loss without a reference, whose rewards are those of the base class."""

    uses_reference = False

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return -beta * (pair.policy_chosen - pair.policy_chosen.detach())


class Headed(nn.Module, DPOLoss):
    """A loss with a parameter, a statistic, a term, and metrics of its own, one of which some rows do not have."""

    calls: Tensor
    terms: Mapping[str, Term] = {
        "ratio": Term(lambda s: s.per_completion(s.policy_tokens - s.reference_tokens), needs_reference_logits=True)
    }
    extra_metrics = ("method/scaled", "method/long")

    def __init__(self) -> None:
        nn.Module.__init__(self)
        DPOLoss.__init__(self)
        self.scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    __call__ = DPOLoss.__call__

    def update_statistics(self, pair: PairLogps) -> None:
        self.calls += 1

    def rewards(self, pair: PairLogps, *, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.scale * pair.terms["ratio"]
        return chosen, rejected

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        assert pair.chosen_length is not None
        long = torch.where(pair.chosen_length > 4, pair.policy_chosen, torch.nan)
        scaled = self.drop(self.scale * pair.policy_chosen)
        return {**super().metrics(pair, alpha=alpha, beta=beta), "method/scaled": scaled, "method/long": long}


LOSSES: list[Any] = [DPOLoss, Unreferenced, lambda: WeightedSPOLoss(gamma=0.5), Headed]


@pytest.mark.parametrize("regularizer", [NoRegularizer(), LocalKL(0.1)], ids=["plain", "local_kl"])
@pytest.mark.parametrize("make", LOSSES, ids=["dpo", "unreferenced", "weighted_spo", "headed"])
def test_evaluation_equals_validation_of_the_same_pairs(make: Any, regularizer: Regularizer, tmp_path: Path) -> None:
    pairs = random_pairs(11, seed=1, preference=lambda i: None if i % 2 else 0.8)
    loss: Loss[Any] = make()
    # The policy has moved away from the model that training started from, and the reference from both.
    policy, reference = tiny_llama(0), FrozenReference()
    module = make_module(
        policy, loss=loss, regularizer=regularizer, reference=reference, reference_model=tiny_llama(1), speed=FAST
    )
    make_trainer(tmp_path).validate(module, make_data(pairs, pairs, eval_batch_size=4), verbose=False)
    expected = {f"eval/{key}": value for key, value in module.validated.items() if key in loss.metric_names}
    seen_before = float(loss.calls) if isinstance(loss, Headed) else 0

    if isinstance(loss, nn.Module):
        loss.eval()
    scoring = Scoring(loss, {"alpha": 0.2, "beta": 0.1}, policy, reference, PLAIN.resolve_for(policy))
    found = pair_metrics(scoring, pairs, batch_size=3, pad_token_id=PAD)
    assert {"eval/rewards/margins", "eval/rewards/accuracies"} <= found.keys()
    assert {f"eval/{name}" for name in loss.extra_metrics} <= found.keys()
    for key, value in found.items():
        if not key.startswith("eval/calibration/"):
            assert value == pytest.approx(expected[key], abs=1e-9), key
    if isinstance(loss, Headed):
        assert loss.calls == seen_before
        long = [i for i, pair in enumerate(pairs) if len(pair.chosen_ids) > 4]
        assert 0 < len(long) < len(pairs)


class Undefined(DPOLoss):
    """A loss whose metrics divide by something that only infinite log-probs make NaN."""

    extra_metrics = ("method/gap",)

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        gap = pair.policy_chosen - pair.policy_chosen
        return {**super().metrics(pair, alpha=alpha, beta=beta), "method/gap": gap}


def test_metric_of_an_impossible_pair_is_not_left_out() -> None:
    policy: Any = tiny_llama(0)
    reference = FrozenReference()
    reference.model = tiny_llama(1)
    pairs = random_pairs(5, seed=1)
    masked = pairs[2].chosen_ids[0]
    plain = policy.lm_head.forward

    def mask(states: Tensor) -> Tensor:
        return plain(states).index_fill(-1, torch.tensor([masked]), -torch.inf)

    policy.lm_head.forward = mask
    scoring = Scoring(Undefined(), {"alpha": 1.0, "beta": 0.1}, policy, reference, PLAIN)
    found = pair_metrics(scoring, pairs, batch_size=2, pad_token_id=PAD)
    assert found["eval/method/gap"] != found["eval/method/gap"]  # NaN, which ends the evaluation in words


class Careless(DPOLoss):
    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        return {**super().metrics(pair, alpha=alpha, beta=beta), "method/new": pair.policy_chosen}


class Averaging(Careless):
    extra_metrics = ("method/new",)

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        return {"method/new": pair.policy_chosen.mean()}


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (Careless(), r"Careless.metrics returns 'method/new'.*add it to extra_metrics = \('method/new',\)"),
        (Averaging(), r"one number of each row as 'method/new', of shape \(8,\), and returns \(\)"),
    ],
)
def test_metric_that_is_undeclared_or_of_another_shape_is_refused_in_words(
    loss: Loss[Any], words: str, tmp_path: Path
) -> None:
    pairs = random_pairs(8, seed=1)
    module = make_module(tiny_llama(0), loss=loss, reference=FrozenReference(), reference_model=tiny_llama(1))
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path).fit(module, make_data(pairs))
