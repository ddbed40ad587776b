"""Losses whose parameters or statistics would be lost, or whose metrics clash, are refused before anything loads."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spo.config.checks.losses import loss_problems
from spo.losses import DPOLoss, PreferenceLoss, Term
from spo.types import PairLogps
from tests.test_learned_losses import Headed, HeadedRunning


def problems(loss: Any, strategy: str = "DDPStrategy") -> list[str]:
    parts: Any = SimpleNamespace(loss=loss, target=lambda key: SimpleNamespace(__name__=strategy))
    return list(loss_problems(parts))


class Plain(PreferenceLoss):
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        return pair.policy_chosen


class Module(Headed):
    def __init__(self, **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)


class OfClass(Plain):
    head = nn.Linear(1, 1)


class Counting(Plain):
    def update_statistics(self, logps: PairLogps) -> None: ...


class CountingModule(Module):
    def update_statistics(self, logps: PairLogps) -> None: ...


class Reversed(nn.Module, PreferenceLoss):
    pass


class WithState(Module):
    def get_extra_state(self) -> Any:
        return 1


def closure() -> Any:
    head = nn.Linear(1, 1)
    return lambda scored: head(scored.policy_tokens)


ANOTHER = "derive Plain from torch.nn.Module too"
REFUSED: dict[str, tuple[Any, str]] = {
    "module": (Plain(head=nn.Linear(1, 1)), rf"Plain\.head would not be trained or saved: {ANOTHER}"),
    "frozen module": (Plain(head=nn.Linear(1, 1).requires_grad_(False)), ANOTHER),
    "parameter": (Plain(scale=nn.Parameter(torch.ones(1))), r"Plain\.scale would not"),
    "tensor": (Plain(scale=torch.ones(1, requires_grad=True)), r"Plain\.scale would not"),
    "list": (Plain(heads=[nn.Linear(1, 1)]), r"Plain\.heads\[0\] would not"),
    "mapping": (Plain(heads={"a": {"b": nn.Linear(1, 1)}}), r"Plain\.heads\['a'\]\['b'\] would not"),
    "object": (Plain(state=SimpleNamespace(head=nn.Linear(1, 1))), r"Plain\.state\.head would not"),
    "partial": (Plain(make=partial(print, nn.Linear(1, 1))), r"Plain\.make would not"),
    "closure of a term": (Plain(terms={"a": Term(closure())}), r"Plain\.terms\['a'\]\.compute \(head\) would not"),
    "class": (OfClass(), r"OfClass\.head would not"),
    "list of a module": (Module(heads=[nn.Linear(1, 1)]), r"Module\.heads\[0\] would not .*ModuleList"),
    "tensor of a module": (Module(extra=torch.ones(1, requires_grad=True)), r"Module\.extra would not"),
    "statistics": (Counting(), "updates statistics, .*torch.nn.Module too, .*register_buffer"),
    "statistics of a module": (CountingModule(), "does not have a buffer in its state"),
    "order of bases": (Reversed(), "comes first among the base classes of Reversed: write it last"),
    "lazy layer": (Module(lazy=nn.LazyLinear(1)), "layers of unknown size"),
    "other state": (WithState(), "the state _extra_state of WithState is not a tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lost_state_is_refused(name: str) -> None:
    loss, words = REFUSED[name]
    [found] = problems(loss)
    assert found.startswith("method.loss: ") and re.search(words, found)


def test_found_state_and_constants_are_accepted() -> None:
    circle: dict[str, Any] = {"weights": torch.ones(3), "numbers": [1.0] * 9}
    circle["itself"] = circle
    heads = nn.ModuleList([nn.Linear(1, 1)])
    for loss in (DPOLoss(), Plain(state=circle, of=nn.Linear), Headed(), HeadedRunning(), Module(heads=heads)):
        assert problems(loss) == []


def test_deepspeed_does_not_carry_a_loss() -> None:
    assert problems(DPOLoss(), "DeepSpeedStrategy") == []
    [found] = problems(Headed(), "DeepSpeedStrategy")
    assert (
        found == "strategy=deepspeed does not carry the parameters and buffers of Headed: choose strategy=ddp or fsdp"
    )


METRICS = {
    "Bad": "use lower-case letters",
    "a//b": "use lower-case letters",
    "a b": "use lower-case letters",
    "rewards/margins": "twice, or a metric that every loss has",
    **dict.fromkeys(
        ("loss", "loss/preference", "grad_norm", "kl", "lr", "step_s", "p_eos", "alpha", "beta/kl", "buffer/age"),
        "the key of another metric",
    ),
    **dict.fromkeys(
        ("win_rate", "reference/kl", "reward/length", "self_bleu", "exact/tv"), "the key of another metric"
    ),
}


@pytest.mark.parametrize("key", METRICS)
def test_metric_keys_that_clash_are_refused(key: str) -> None:
    [found] = problems(Plain(extra_metrics=(key,)))
    assert repr(key) in found and METRICS[key] in found


def test_other_metric_keys_are_accepted() -> None:
    assert problems(Plain(extra_metrics=("head/scale", "mean_2", "flip_probability"))) == []
    assert "twice" in problems(Plain(extra_metrics=("a", "a")))[0]
    assert "write extra_metrics = ('foo',)" in problems(Plain(extra_metrics="foo"))[0]
