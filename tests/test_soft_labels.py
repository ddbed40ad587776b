"""Labels of pairs in losses whose rows depend on each other: a certain label, an expectation, and repeated rows."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.losses import (
    AlphaDPOLoss,
    AOTLoss,
    CPOLoss,
    DPOLoss,
    DPONLLLoss,
    Loss,
    MixLoss,
    MRPOLoss,
    ORPOLoss,
    PreferenceLoss,
    RPOLoss,
    SFTLoss,
    WeightedSPOLoss,
)
from spo.types import PairLogps

ROWS = 5
COEFFICIENTS = {"alpha": 0.3, "beta": 0.5}
TOGETHER: dict[str, PreferenceLoss] = {
    "aot": AOTLoss(),
    "aot_unpaired": AOTLoss(unpaired=True, label_smoothing=0.1),
    "alpha_dpo": AlphaDPOLoss(),
    "cpo_batch": CPOLoss(nll_mean="batch"),
    "dpo_nll_batch": DPONLLLoss(nll_mean="batch"),
    "orpo_batch": ORPOLoss(nll_mean="batch"),
    "rpo": RPOLoss(),
    "spo_weighted": WeightedSPOLoss(gamma=0.5),
}


def some_pairs(preference: list[float] | None = None) -> PairLogps:
    generator = torch.Generator().manual_seed(3)

    def logps() -> Tensor:
        return -1 - 10 * torch.rand(ROWS, generator=generator).double()

    def lengths() -> Tensor:
        return torch.randint(2, 9, (ROWS,), generator=generator)

    embedding = torch.randn(ROWS, 512, generator=generator).double()
    numbers = (logps(), logps(), logps(), logps(), lengths(), lengths())
    label = None if preference is None else torch.tensor(preference, dtype=torch.float64)
    return PairLogps(*numbers, preference=label, features={"prompt_embedding": embedding})


def exchanged(pairs: PairLogps, rows: Tensor) -> PairLogps:
    """Return pairs without labels, with the two completions exchanged in some rows."""
    plain = replace(pairs, preference=None)
    ours, theirs = plain.columns(), plain.swapped().columns()

    def either(path: str) -> Tensor:
        return torch.where(rows.view(-1, *[1] * (ours[path].ndim - 1)), theirs[path], ours[path])

    return plain.with_columns({path: either(path) for path in ours})


def repeated(pairs: PairLogps, shares: Tensor, copies: int) -> PairLogps:
    """Return each pair several times, exchanged in as many of the copies as the label says."""
    parts = [exchanged(pairs, k >= shares * copies).columns() for k in range(copies)]
    return pairs.with_columns({path: torch.cat([part[path] for part in parts]) for path in parts[0]})


def values(loss: Loss[Any], pairs: PairLogps) -> Tensor:
    if loss.has_statistics:
        loss.update_statistics(pairs)
    return loss(pairs, **COEFFICIENTS)


@pytest.mark.parametrize("name", TOGETHER)
def test_label_of_zero_exchanges_the_completions(name: str) -> None:
    label = [1.0, 0.0, 0.0, 1.0, 0.0]
    make = AlphaDPOLoss if name == "alpha_dpo" else lambda: TOGETHER[name]
    given = some_pairs(label)
    wanted = values(make(), exchanged(given, torch.tensor(label) == 0))
    torch.testing.assert_close(values(make(), given), wanted, rtol=1e-12, atol=1e-12)


def test_relative_po_is_the_expectation_over_all_labels() -> None:
    given, loss = some_pairs([0.0, 0.3, 0.5, 1.0, 0.9]), TOGETHER["rpo"]
    assert given.preference is not None
    total = torch.zeros(ROWS).double()
    for bits in itertools.product([True, False], repeat=ROWS):
        is_wrong = torch.tensor(bits)
        chance = torch.where(is_wrong, 1 - given.preference, given.preference).prod()
        total += chance * values(loss, exchanged(given, is_wrong))
    torch.testing.assert_close(values(loss, given), total, rtol=1e-12, atol=1e-12)


def test_likelihood_per_token_of_soft_labels_is_that_of_repeated_pairs() -> None:
    given = some_pairs([0.0, 0.25, 0.5, 1.0, 0.75])
    assert given.preference is not None
    copies = repeated(given, given.preference, 4)
    for name in ("cpo_batch", "dpo_nll_batch", "orpo_batch"):
        ours, theirs = (values(TOGETHER[name], one).mean() for one in (given, copies))
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-12), name


def test_statistics_of_soft_labels_are_those_of_repeated_pairs() -> None:
    given = some_pairs([0.0, 0.25, 0.5, 1.0, 0.75])
    assert given.preference is not None
    one, other = AlphaDPOLoss(), AlphaDPOLoss()
    one.update_statistics(given)
    other.update_statistics(repeated(given, given.preference, 4))
    assert one.mean.item() == pytest.approx(other.mean.item(), rel=1e-12) and one.mean != 0
    # Both deviations have the number of their rows, less one, as denominator.
    population = other.std.item() * math.sqrt((4 * ROWS - 1) / (4 * ROWS))
    assert one.std.item() * math.sqrt((ROWS - 1) / ROWS) == pytest.approx(population, rel=1e-12)


def test_transport_depends_on_how_sure_the_likelier_label_is() -> None:
    loss = TOGETHER["aot"]
    given = some_pairs([0.8, 0.2, 0.2, 0.8, 0.8])
    clear = exchanged(given, torch.tensor([False, True, True, False, False]))
    smoothed = AOTLoss(label_smoothing=0.2)
    torch.testing.assert_close(values(loss, given), values(smoothed, clear), rtol=1e-12, atol=1e-12)
    assert (values(loss, given) - values(loss, clear)).abs().min() > 1e-6


def test_likelihood_in_a_mix_follows_the_labels_of_the_comparison() -> None:
    given = some_pairs([0.0, 0.3, 0.5, 1.0, 0.9])
    likelihood = SFTLoss(length_normalize=True)
    mix = MixLoss({"dpo": DPOLoss(), "sft": likelihood}, {"dpo": 1.0, "sft": 0.7})
    torch.testing.assert_close(values(mix, given), values(DPONLLLoss(0.7), given), rtol=1e-12, atol=1e-12)
    assert not likelihood.uses_rejected
    alone = MixLoss({"sft": likelihood}, {"sft": 1.0})
    torch.testing.assert_close(values(alone, given), values(likelihood, given))


@pytest.mark.parametrize("weights", [(0.0, 0.0), (math.inf, 1.0), (math.nan, 1.0), (-1.0, 1.0)])
def test_weights_of_a_mix_that_train_nothing_are_errors(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="weights must be finite and at least 0, one of them above 0"):
        MixLoss({"dpo": DPOLoss(), "sft": SFTLoss()}, dict(zip(("dpo", "sft"), weights, strict=True)))


def test_what_is_not_a_loss_or_a_number_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match=r"losses\.sft must be a loss with a _target_, got 3"):
        MixLoss({"dpo": DPOLoss(), "sft": 3}, {"dpo": 1, "sft": 1})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="weights must be numbers, got"):
        MixLoss({"dpo": DPOLoss()}, {"dpo": "much"})  # type: ignore[dict-item]


@pytest.mark.parametrize("references", ["extra", [], ["one", "one"], [1]])
def test_names_of_several_references_are_a_list_of_different_names(references: Any) -> None:
    with pytest.raises(ValueError, match="references must be a list of different names"):
        MRPOLoss(references)
