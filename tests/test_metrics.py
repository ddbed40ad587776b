"""Metrics are means over elements for any grouping of the elements."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from spo.metrics.calibration import Calibration
from spo.metrics.repetition import repetition
from spo.metrics.sums import SumsAndCounts


def test_every_element_counts_once_for_any_batching() -> None:
    values = torch.randn(11, dtype=torch.float64)
    for size in (1, 4, 7, 11):
        metric = SumsAndCounts(("a", "b"))
        for part in values.split(size):
            metric.update({"a": part})
        assert metric.compute() == {"a": pytest.approx(values.mean().item(), rel=1e-14)}


def test_quantities_have_separate_counts_and_unseen_ones_are_absent() -> None:
    metric = SumsAndCounts(("a", "b", "never"))
    metric.update({"a": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "b": 10.0})
    metric.update({"b": torch.tensor(20.0), "a": torch.zeros(0)})
    assert metric.compute() == {"a": 3.0, "b": 15.0}
    metric.reset()
    metric.update({"b": 1.0})
    assert metric.compute() == {"b": 1.0}


def test_sums_are_float64_and_detached() -> None:
    metric = SumsAndCounts(("a",))
    metric.update({"a": torch.full((4,), 2.0**24, requires_grad=True)})
    metric.update({"a": torch.ones(1)})
    assert metric.compute() == {"a": (4 * 2.0**24 + 1) / 5}  # float32 would have lost the 1
    assert not metric.sums.requires_grad


def test_state_dict_contains_stored_values() -> None:
    metric, restored = SumsAndCounts(("a", "b")), SumsAndCounts(("a", "b"))
    metric.update({"a": torch.tensor([1.0, 5.0])})
    metric.update({"b": 2})
    restored.load_state_dict(metric.state_dict())
    assert restored.compute() == {"a": 3.0, "b": 2.0} == metric.compute()
    metric.update({"a": 6})
    assert metric.compute() == {"a": 4.0, "b": 2.0}


def test_unknown_quantity_is_an_error() -> None:
    with pytest.raises(ValueError):
        SumsAndCounts(("a",)).update({"typo": 1.0})


def test_state_survives_a_checkpoint() -> None:
    first, second = SumsAndCounts(("a", "b")), SumsAndCounts(("a", "b"))
    first.update({"a": torch.tensor([1.0, 2.0])})
    second.load_state_dict(first.state_dict())
    second.update({"a": torch.tensor([6.0])})
    assert second.compute() == {"a": 3.0}


def test_missing_elements_of_named_quantities_are_left_out_and_any_other_nan_is_seen() -> None:
    nan = math.nan
    metric = SumsAndCounts(("own", "none", "loss"), gaps=("own", "none"))
    metric.update({"own": torch.tensor([1.0, nan, 3.0]), "none": torch.tensor([nan]), "loss": torch.tensor([1.0, nan])})
    metric.update({"own": nan, "none": nan, "loss": 1.0})
    metric.update({"own": 8.0})
    found = metric.compute()
    assert found["own"] == 4.0 and "none" not in found and math.isnan(found["loss"])
    infinite = SumsAndCounts(("own",), gaps=("own",))
    infinite.update({"own": torch.tensor([math.inf, nan])})
    assert infinite.compute() == {"own": math.inf}


# -------------------------------------------------------------------------------------------------- calibration


def calibrated(margin: torch.Tensor, preference: torch.Tensor | None = None, size: int = 1000) -> dict[str, float]:
    metric = Calibration()
    for first in range(0, len(margin), size):
        rows = slice(first, first + size)
        metric.update(margin[rows], None if preference is None else preference[rows])
    return metric.compute()


def test_calibration_by_hand() -> None:
    confident, unsure = math.log(0.9 / 0.1), math.log(0.6 / 0.4)
    found = calibrated(torch.tensor([confident, -confident, unsure], dtype=torch.float64))
    # The bin of 0.9 is right once of two, the bin of 0.6 once of one.
    assert found["ece"] == pytest.approx((abs(2 * 0.9 - 1) + abs(0.6 - 1)) / 3)
    assert found["brier"] == pytest.approx((0.1**2 + 0.9**2 + 0.4**2) / 3)
    assert found["log_loss"] == pytest.approx(-(math.log(0.9) + math.log(0.1) + math.log(0.6)) / 3)
    certain = calibrated(torch.tensor([1000.0, -1000.0]))
    assert (certain["ece"], certain["brier"], certain["log_loss"]) == (0.5, 0.5, 500.0)
    assert calibrated(torch.zeros(5)) == {"ece": 0.0, "brier": 0.25, "log_loss": pytest.approx(math.log(2))}
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert calibrated(torch.zeros(0)) == {}


def test_calibration_equals_torchmetrics_for_hard_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    margin = torch.randn(500, generator=generator, dtype=torch.float64) * 2
    # A binary classifier sees the same pairs in a random order of their two sides.
    flipped = torch.rand(500, generator=generator) < 0.5
    confidence, right = margin.abs().sigmoid(), (margin > 0).long()
    expected = binary_calibration_error(confidence, right, n_bins=20, norm="l1")  # of which ten lie above 0.5
    assert calibrated(margin)["ece"] == pytest.approx(expected.item(), abs=1e-6)
    assert calibrated(margin.where(~flipped, -margin), (~flipped).double()) == pytest.approx(calibrated(margin))


def test_reward_that_matches_the_preferences_is_calibrated() -> None:
    margin = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    soft = margin.sigmoid()
    assert calibrated(margin, soft)["ece"] == pytest.approx(0, abs=1e-12)
    assert calibrated(margin, soft)["brier"] == pytest.approx(0, abs=1e-12)
    drawn = (torch.rand(2001, generator=torch.Generator().manual_seed(1)) < soft).double()
    assert calibrated(margin, drawn)["ece"] < 0.04 < 0.1 < calibrated(5 * margin, drawn)["ece"]


def test_calibration_is_the_same_for_any_batch_size() -> None:
    rng = np.random.default_rng(0)
    margin, soft = torch.tensor(rng.normal(size=101)), torch.tensor(rng.random(101))
    whole = calibrated(margin, soft)
    for size in (1, 4, 7):
        assert calibrated(margin, soft, size) == pytest.approx(whole, rel=1e-12)


# --------------------------------------------------------------------------------------------------- repetition


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3]) == repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([1, 2] * 4) == pytest.approx(3 / 5)  # 1212 2121 1212 2121 1212
    assert repetition([7] * 9) == pytest.approx(5 / 6)
    assert repetition("abab", n=2) == pytest.approx(1 / 3)  # type: ignore[arg-type]


def test_sums_of_each_process_return_to_it() -> None:
    metric = SumsAndCounts(("a", "b"))
    metric.update({"a": torch.tensor([1.0, 3.0])})
    assert {name: rows.tolist() for name, rows in metric.by_rank().items()} == {"sums": [[4, 0]], "counts": [[2, 0]]}
    rows = {"sums": torch.tensor([[4.0, 0.0], [1.0, 2.0]]), "counts": torch.tensor([[2.0, 0.0], [1.0, 1.0]])}
    assert metric.of_rank(rows, 1, 2)["sums"].tolist() == [1, 2]
    assert [metric.of_rank(rows, rank, 3)["counts"].tolist() for rank in range(3)] == [[3, 1], [0, 0], [0, 0]]


def test_sums_saved_between_two_steps_continue_bit_for_bit() -> None:
    values = torch.rand(9, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e3 - 500
    found = []
    for saved_after in (None, 2, 5):
        sums = SumsAndCounts(("x",))
        for step, row in enumerate(values):
            sums.start_group()
            sums.update({"x": row})
            if step == saved_after:
                state = sums.state_dict()
                sums = SumsAndCounts(("x",))
                sums.load_state_dict(state)
        found.append(sums.compute()["x"])
    assert found[0] == found[1] == found[2]
