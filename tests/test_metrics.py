"""Metrics are means over elements, however the elements were grouped."""

from __future__ import annotations

import pytest
import torch

from spo.metrics import SumsAndCounts


def test_every_element_counts_once_however_they_are_batched() -> None:
    values = torch.randn(11, dtype=torch.float64)
    for size in (1, 4, 7, 11):
        metric = SumsAndCounts(("a", "b"))
        for part in values.split(size):
            metric.update({"a": part})
        assert metric.compute() == {"a": pytest.approx(values.mean().item(), rel=1e-14)}


def test_each_quantity_has_its_own_count_and_an_unseen_one_is_absent() -> None:
    metric = SumsAndCounts(("a", "b", "never"))
    metric.update({"a": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "b": 10.0})
    metric.update({"b": torch.tensor(20.0), "a": torch.zeros(0)})
    assert metric.compute() == {"a": 3.0, "b": 15.0}
    metric.reset()
    metric.update({"b": 1.0})
    assert metric.compute() == {"b": 1.0}


def test_sums_are_wider_than_their_elements_and_detached() -> None:
    metric = SumsAndCounts(("a",))
    metric.update({"a": torch.full((4,), 2.0**24, requires_grad=True)})
    metric.update({"a": torch.ones(1)})
    assert metric.sums.item() == 4 * 2.0**24 + 1  # float32 would have lost the 1
    assert not metric.sums.requires_grad


def test_an_unknown_quantity_is_an_error() -> None:
    with pytest.raises(ValueError):
        SumsAndCounts(("a",)).update({"typo": 1.0})


def test_state_survives_a_checkpoint() -> None:
    first, second = SumsAndCounts(("a", "b")), SumsAndCounts(("a", "b"))
    first.update({"a": torch.tensor([1.0, 2.0])})
    second.load_state_dict(first.state_dict())
    second.update({"a": torch.tensor([6.0])})
    assert second.compute() == {"a": 3.0}
