"""Losses in which pairs depend on each other: one value, however the pairs are cut into batches and processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spo.data import TokenizedPair
from spo.data.collate import collate
from spo.losses import ListLoss, Loss, WeightedSPOLoss
from spo.models import FrozenReference
from spo.objective import concat_logps
from spo.regularizers import LocalKL
from spo.types import ListLogps, PairLogps
from tests.helpers import (
    PAD,
    PLAIN,
    Bigrams,
    Spied,
    completion_logps,
    make_data,
    make_module,
    make_trainer,
    random_pairs,
    run_on_two_ranks,
)

LOSS = WeightedSPOLoss(gamma=0.5, clip=4.0)


class ShareLoss(ListLoss):
    """A loss of lists that no sum over batches gives: the log of the best completions' sum over all lists."""

    uses_reference = False
    uses_beta = False
    full_batch = True

    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        best, others = lists.policy[:, 0], lists.policy[:, 1:].masked_fill(~lists.mask[:, 1:], 0).sum(-1)
        return (best - best.mean()).square() + (others * best.mean().exp())


def some_pairs() -> list[TokenizedPair]:
    # Only some pairs have a label and a weight, so some batches do not have any.
    return random_pairs(
        11,
        seed=1,
        preference=lambda i: None if i % 2 else 1 - i / 100,
        weight=lambda i: None if i > 5 else 0.5 + i / 10,
    )


def some_lists() -> list[TokenizedPair]:
    pairs = some_pairs()
    return [
        replace(pair, worse_ids=tuple(other.chosen_ids for other in pairs[: i % 3])) for i, pair in enumerate(pairs)
    ]


def fitted(
    folder: Path, pairs: list[TokenizedPair], loss: Loss[Any], *, micro: int | None, eval_batch: int, **trainer: Any
) -> Spied:
    module = make_module(
        Bigrams(0),
        loss=loss,
        regularizer=LocalKL(0.1),
        reference=FrozenReference(),
        reference_model=Bigrams(1),
        speed=PLAIN,
        micro_batch_size=micro,
        lr=0.01,
    )
    data = make_data(pairs, pairs, max_steps=2, batch_size=7, micro_batch_size=micro, eval_batch_size=eval_batch)
    make_trainer(folder, max_steps=2, val_check_interval=1, **trainer).fit(module, datamodule=data)
    return module


def logged(module: Spied) -> dict[str, float]:
    return {key: float(v) for key, v in module.trainer.callback_metrics.items() if "time" not in key}


def assert_same(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], tolerance: float) -> None:
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        largest = max(g.abs().max().item() for g in other.values())
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance * largest, msg=name)


COMPOSITIONS: dict[str, tuple[Callable[[], list[TokenizedPair]], Loss[Any]]] = {
    "pairs": (some_pairs, LOSS),
    "lists": (some_lists, ShareLoss()),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_batches_do_not_change_a_loss_of_all_pairs(name: str, tmp_path: Path) -> None:
    pairs, loss = COMPOSITIONS[name]
    whole = fitted(tmp_path, pairs(), loss, micro=None, eval_batch=32)
    for micro, eval_batch in ((3, 1), (1, 3)):
        cut = fitted(tmp_path, pairs(), loss, micro=micro, eval_batch=eval_batch)
        assert_same(cut.gradients, whole.gradients, 1e-12)
        assert logged(cut) == pytest.approx(logged(whole), rel=1e-12)


def test_step_and_validation_are_one_call_of_the_loss(tmp_path: Path) -> None:
    pairs, policy = some_pairs()[:7], Bigrams(0)
    batch = collate(pairs, range(7), PAD)
    logps = completion_logps(policy, batch.sequences), completion_logps(Bigrams(1), batch.sequences)
    value = LOSS(PairLogps.of_batch(batch, *logps), alpha=0.2, beta=0.1).mean()
    value.backward()
    models: dict[str, Any] = {"reference": FrozenReference(), "reference_model": Bigrams(1)}
    module = make_module(Bigrams(0), loss=LOSS, **models, lr=0.0, speed=PLAIN)
    data = make_data(pairs, pairs, batch_size=7, micro_batch_size=2, eval_batch_size=2)
    trainer = make_trainer(tmp_path, num_sanity_val_steps=-1)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(value.item(), rel=1e-7)
    assert module.validated["loss"] == pytest.approx(value.item(), rel=1e-12)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(module.gradients[0][name], parameter.grad)


def test_micro_batches_of_dropout_have_the_same_masks(tmp_path: Path) -> None:
    """The weights come from an earlier pass, which has to drop what the pass with gradient drops."""
    seen: list[tuple[bool, Tensor]] = []

    class Dropping(Bigrams):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
            states = nn.functional.dropout(self.states(input_ids), 0.5, self.training)
            seen.append((torch.is_grad_enabled(), states.detach()))
            return SimpleNamespace(logits=self.head(states))

    module = make_module(Dropping(0), loss=LOSS, reference=FrozenReference(), reference_model=Bigrams(1), speed=PLAIN)
    seen.clear()
    make_trainer(tmp_path).fit(module, datamodule=make_data(some_pairs(), batch_size=7, micro_batch_size=2))
    ahead, after = ([states for grad, states in seen if grad == wanted] for wanted in (False, True))
    assert len(after) == 4
    for one, other in zip(ahead[-4:], after, strict=True):
        assert torch.equal(one, other)


def test_concat_fills_up_labels_and_lists() -> None:
    numbers = torch.arange(3.0, dtype=torch.float64)
    pairs = concat_logps([PairLogps(numbers[:1], numbers[:1]), PairLogps(numbers, numbers, preference=numbers.float())])
    assert isinstance(pairs, PairLogps) and pairs.reference_chosen is None
    assert pairs.preference is not None and pairs.preference.tolist() == [1, 0, 1, 2]
    with pytest.raises(ValueError, match="policy_rejected is known for some of the pairs only"):
        concat_logps([PairLogps(numbers, numbers), PairLogps(numbers)])
    lists = [
        ListLogps(torch.ones(1, n), torch.ones(1, n, dtype=torch.bool), torch.arange(n).flip(0)[None]) for n in (2, 3)
    ]
    whole = concat_logps(lists)
    assert isinstance(whole, ListLogps)
    assert whole.mask.tolist() == [[True, True, False], [True, True, True]]
    assert whole.order.tolist() == [[1, 0, 2], [2, 1, 0]]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    run_on_two_ranks(__name__, tmp_path)
    for name, (make, loss) in COMPOSITIONS.items():
        alone = fitted(tmp_path, make(), loss, micro=None, eval_batch=32)
        for micro in (None, 2):
            two = torch.load(tmp_path / f"{name}_{micro}.pt", weights_only=True)
            assert_same(two["gradients"], alone.gradients, 1e-12)
            assert two["metrics"] == pytest.approx(logged(alone), rel=1e-6)


if __name__ == "__main__":
    [out] = map(Path, sys.argv[1:])
    for name, (make, loss) in COMPOSITIONS.items():
        for micro in (None, 2):
            both = fitted(out, make(), loss, micro=micro, eval_batch=2, devices=2, strategy="ddp")
            if both.trainer.is_global_zero:
                torch.save({"gradients": both.gradients, "metrics": logged(both)}, out / f"{name}_{micro}.pt")
