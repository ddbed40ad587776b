"""A loss that writes __call__ itself reads the labels and weights that the data has, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from spo.config.compose import compose
from spo.data import RowError, TokenizedPair
from spo.errors import UserError
from spo.losses import (
    Column,
    DPOLoss,
    Feature,
    LabelledLoss,
    ListLoss,
    Loss,
    PreferenceLoss,
    Role,
    SPOLoss,
    Term,
    log_ratios,
)
from spo.losses.base import weighted
from spo.stages import reference_model
from spo.stages.label_checks import check_labels
from spo.stages.prepare import prepare_run
from spo.stages.trained import check_pairs
from spo.types import LabelledLogps, ListLogps, PairLogps
from tests.helpers import random_pairs

HARD: Mapping[str, Callable[[int], Any]] = {}
SOFT: Mapping[str, Callable[[int], Any]] = {"preference": lambda i: 0.5 + i / 20 if i % 3 else None}
FLIPPED: Mapping[str, Callable[[int], Any]] = {"preference": lambda i: float(i % 2)}
WEIGHTED: Mapping[str, Callable[[int], Any]] = {"weight": lambda i: 1.0 + i}


def hinge(pair: PairLogps, beta: float) -> Tensor:
    chosen, rejected = log_ratios(pair)
    assert rejected is not None
    return torch.relu(1 - beta * (chosen - rejected))


def soft(pair: PairLogps, beta: float, label: Tensor) -> Tensor:
    return label * hinge(pair, beta) + (1 - label) * hinge(pair.swapped(), beta)


class HingeLoss(PreferenceLoss):
    """The first loss of the documentation of version 0.1.0."""

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        chosen = pair.policy_chosen - pair.reference_chosen  # type: ignore[operator]
        rejected = pair.policy_rejected - pair.reference_rejected  # type: ignore[operator]
        return torch.relu(1 - beta * (chosen - rejected))


class Weighing(PreferenceLoss):
    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return weighted(hinge(pair, beta), pair)


class MeanWeighing(PreferenceLoss):
    """Divides weights by their mean."""

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return hinge(pair, beta) * (1 if pair.weight is None else pair.weight / pair.weight.mean())


class Rounding(PreferenceLoss):
    """Reads a soft label as the more likely hard one."""

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        label = torch.ones(len(pair)) if pair.preference is None else (pair.preference >= 0.5).float()
        return weighted(soft(pair, beta, label), pair)


class Reading(PreferenceLoss):
    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        label = torch.ones(len(pair)) if pair.preference is None else pair.preference
        return weighted(soft(pair, beta, label), pair)


class Symmetric(PreferenceLoss):
    """Has the same value for both outcomes of a label."""

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return weighted((pair.policy_chosen - pair.policy_rejected) ** 2, pair)  # type: ignore[operator]


class Supervised(PreferenceLoss):
    uses_rejected = False

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return -pair.policy_chosen


class Noisy(PreferenceLoss):
    """Draws random numbers, and counts its calls."""

    calls = 0

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        self.calls += 1
        return hinge(pair, beta) + torch.rand(len(pair)) + self.calls


class Asking(PreferenceLoss, nn.Module):
    """Asks for much, has a parameter, and ignores labels."""

    terms: Mapping[str, Term] = {"kl": Term(lambda scored: scored.lengths)}
    features: Mapping[str, Feature] = {
        "grade": Feature(("a", "b")),
        "embedding": Feature("c", size=3),
        "flip": Feature("d"),
    }
    extra_completions: Mapping[str, Role] = {"anchor": Column("anchor")}
    extra_references = ("teacher",)

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1)

    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        anchor = pair.extra["anchor"]
        assert anchor.reference is not None
        more = pair.terms["kl"].sum(0) + pair.references["teacher"].sum(0) + anchor.policy - anchor.reference
        return hinge(pair, beta) + more + self.head(pair.features["embedding"]).squeeze(-1) + pair.features["flip"]


class Unreadable(PreferenceLoss):
    def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        raise ValueError("needs real numbers")


class Bare(Loss[PairLogps]):
    def __call__(self, pair: PairLogps, /, *, alpha: float, beta: float) -> Tensor:
        return hinge(pair, beta)

    def metrics(self, pair: PairLogps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        return {}


class TopOne(ListLoss):
    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        return -lists.policy.log_softmax(-1)[:, 0]


class BestOfList(TopOne):
    def __call__(self, lists: ListLogps, /, *, alpha: float, beta: float) -> Tensor:
        return self.of_ranking(lists.best_first(), alpha=alpha, beta=beta)


class Classifier(LabelledLoss):
    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        return torch.where(logps.label == 1, -logps.policy, logps.policy)


class HardClassifier(Classifier):
    """Takes a soft label for a bad one."""

    def __call__(self, logps: LabelledLogps, /, *, alpha: float, beta: float) -> Tensor:
        return weighted(self.of_labels(logps, alpha=alpha, beta=beta), logps)


class NoClassifier(LabelledLoss):
    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        raise AssertionError

    def __call__(self, logps: LabelledLogps, /, *, alpha: float, beta: float) -> Tensor:
        return -logps.policy


WRITE_PAIRS = "write of_pairs instead of __call__"
LABELS, WEIGHTS = "the labels \\(preference\\) of 6 of 9 training", "the weights \\(weight\\) of 8 of 9 training"


@pytest.mark.parametrize(
    ("loss", "columns", "words"),
    [
        (HingeLoss(), HARD, None),
        (HingeLoss(), SOFT, f"method.loss: HingeLoss ignores {LABELS} pairs: {WRITE_PAIRS}"),
        (
            HingeLoss(),
            FLIPPED,
            f"HingeLoss ignores the labels \\(preference\\) of 5 of 9 training pairs: {WRITE_PAIRS}",
        ),
        (HingeLoss(), WEIGHTED, f"method.loss: HingeLoss ignores {WEIGHTS} pairs: {WRITE_PAIRS}"),
        (HingeLoss(), {"weight": lambda i: 1 + 1e-7}, None),
        (Weighing(), WEIGHTED, None),
        (Weighing(), SOFT, f"Weighing ignores {LABELS}"),
        (MeanWeighing(), WEIGHTED, None),
        (Rounding(), FLIPPED, None),
        (Rounding(), SOFT, f"Rounding ignores {LABELS}"),
        (Reading(), {**SOFT, **WEIGHTED}, None),
        (Symmetric(), {**SOFT, **WEIGHTED}, None),
        (Supervised(), SOFT, None),
        (Supervised(), WEIGHTED, f"Supervised ignores {WEIGHTS}"),
        (Noisy(), SOFT, f"Noisy ignores {LABELS}"),
        (Asking(), SOFT, f"Asking ignores {LABELS}"),
        (Unreadable(), SOFT, None),
        (Bare(), SOFT, f"Bare ignores {LABELS} pairs: derive it from spo.losses.PreferenceLoss, and {WRITE_PAIRS}"),
        (SPOLoss(), {**SOFT, **WEIGHTED}, None),
        (TopOne(), {**SOFT, **WEIGHTED}, None),
        (BestOfList(), SOFT, f"BestOfList ignores {LABELS} lists: write of_ranking instead of __call__"),
        (BestOfList(), WEIGHTED, f"BestOfList ignores {WEIGHTS} lists"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Loss) else "",
)
def test_loss_has_to_read_labels_and_weights(loss: Loss[Any], columns: dict[str, Any], words: str | None) -> None:
    pairs = random_pairs(9, seed=0, **columns)
    before = torch.get_rng_state()
    if words is None:
        check_pairs(pairs, loss)
    else:
        with pytest.raises(UserError, match=words):
            check_pairs(pairs, loss)
    assert torch.equal(torch.get_rng_state(), before) and not getattr(loss, "calls", 0)


@pytest.mark.parametrize(
    ("loss", "labels", "count"),
    [
        (Classifier(), [1.0, 0.0, 0.3], 0),
        (HardClassifier(), [1.0, 0.0, 0.0], 0),
        (HardClassifier(), [1.0, 0.0, 0.3], 1),
        (NoClassifier(), [1.0, 0.0, 0.0], 2),
    ],
)
def test_loss_of_completions_has_to_read_labels(loss: Loss[Any], labels: list[float], count: int) -> None:
    rows = cast(list[TokenizedPair], [SimpleNamespace(label=label, weight=None) for label in labels])
    if not count:
        check_labels(rows, loss)
        return
    words = rf"{type(loss).__name__} ignores the labels \(label\) of {count} of 3 training completions: write of_labels"
    with pytest.raises(UserError, match=words):
        check_labels(rows, loss)


def test_loss_that_reads_some_labels_is_not_refused() -> None:
    """A loss may round labels beyond a limit, for example."""

    class Clipping(DPOLoss):
        def __call__(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
            label = None if pair.preference is None else torch.where(pair.preference > 0.8, 1.0, pair.preference)
            return super().__call__(replace(pair, preference=label), alpha=alpha, beta=beta)

    check_pairs(random_pairs(9, seed=0, preference=SOFT["preference"]), Clipping())
    with pytest.raises(UserError, match="Clipping ignores"):
        check_pairs(random_pairs(9, seed=0, preference=lambda i: 0.9), Clipping())


class FlipLoss(DPOLoss):
    features: Mapping[str, Feature] = MappingProxyType({"flip": Feature("flip")})


FLIP = "method.loss._target_=tests.test_label_checks.FlipLoss"


# --- rows that the loss cannot read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "last", "message"),
    [
        ("method=dpo", {"prompt": "a", "chosen": "b"}, "line 9: column 'rejected'"),
        (FLIP, {"prompt": "a", "chosen": "b", "rejected": "c"}, "line 9: column 'flip': missing; method.loss reads it"),
    ],
)
def test_an_unreadable_row_is_reported_before_the_reference_model_is_trained(
    method: str, last: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"prompt": "x", "chosen": "y", "rejected": "z", "flip": 0.1}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*[row] * 8, last]))
    trained: list[bool] = []
    monkeypatch.setattr(reference_model, "_fit_supervised", lambda *_: trained.append(True))
    words = [method, "data=jsonl", f"data.path={tmp_path}/rows.jsonl", f"paths.cache={tmp_path}/cache"]
    cfg = OmegaConf.to_container(compose([*words, "trainer.max_steps=1"], run_dir=str(tmp_path)), resolve=True)
    with pytest.raises(RowError, match=message):
        prepare_run(cast(DictConfig, OmegaConf.create(cfg)))
    assert not trained
