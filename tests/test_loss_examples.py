"""Each loss that the documentation shows: a tiny model trains and validates with it, and its values are right.

The losses get what they declare and nothing else, so an example that forgets a declaration fails.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spo.data import TokenizedPair
from spo.data.collate import collate
from spo.errors import UserError
from spo.losses import Loss, PreferenceLoss, Term
from spo.models import FrozenReference
from spo.objective import score
from spo.types import ListLogps, Logps, PairLogps, PreferenceBatch, Window
from tests.helpers import FAST, PAD, Spied, frozen, make_module, make_trainer, random_pairs, tiny_llama
from tests.test_docs import BLOCKS, Block

Array = NDArray[np.float64]
B, ALPHA, BETA = 7, 0.4, 0.3
COLUMNS = {"flip_probability": [0.1 * i for i in range(B)], "annotator": [float(i % 3) for i in range(B)]}
"""Numbers that the data has for the examples."""
PREFERENCE = [None, 0.0, 0.25, 0.5, 0.8, 1.0, None]
WEIGHT = [None, 2.0, 0.5, None, 0.0, 1.0, 3.0]
PAIRS = random_pairs(B, seed=3, preference=lambda i: PREFERENCE[i], weight=lambda i: WEIGHT[i])
ROWS = [replace(pair, worse_ids=(PAIRS[i - 1].chosen_ids,)) for i, pair in enumerate(PAIRS)]
POLICY, REFERENCE, TEACHER = range(3)
"""Random seeds of the models."""


def loss_class(block: Block) -> type[Loss[Any]]:
    """Return the loss that an example defines."""
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(block.text, str(block), "exec"), namespace)
    [loss] = [
        one
        for one in namespace.values()
        if isinstance(one, type) and issubclass(one, Loss) and one.__module__ == "example"
    ]
    return loss


CLASSES = {str(block): loss_class(block) for block in BLOCKS if block.tag == "loss"}
EACH = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


WIDTH = 16


def made(make: type[Loss[Any]]) -> Loss[Any]:
    """Return a loss for the models of this file, always with the same parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = make()
        loss.fit_width(WIDTH)
    return loss


def example(name: str) -> type[Loss[Any]]:
    """Return the loss of the examples that has a name."""
    [make] = [one for one in CLASSES.values() if one.__name__ == name]
    return make


@cache
def model(seed: int) -> nn.Module:
    return frozen(tiny_llama(seed, scale=0.3))


def attached(seed: int) -> FrozenReference:
    reference = FrozenReference()
    reference.attach(lambda: model(seed))
    return reference


def references_of(loss: Loss[Any]) -> dict[str, FrozenReference]:
    return {name: attached(TEACHER) for name in loss.extra_references}


def batch_for(loss: Loss[Any]) -> PreferenceBatch:
    """Return a batch with what the loss declares of the data. The third completion of a list serves as the others."""
    if loss.inputs is ListLogps:
        return collate([replace(row, preference=None) for row in ROWS], range(B), PAD)
    batch = collate(ROWS, range(B), PAD)
    assert batch.completions is not None
    best, rejected, other = batch.completions
    features = {name: torch.tensor(COLUMNS[str(one.column)]) for name, one in loss.features.items()}
    batch = replace(batch, features=features, extra=dict.fromkeys(loss.extra_completions, other))
    if loss.inputs is PairLogps:
        return replace(batch, completions=torch.stack([best, rejected]))
    label = torch.tensor([1.0 if p is None else p for p in PREFERENCE])
    return replace(batch, completions=best[None], label=label, preference=None)


def inputs_for(loss: Loss[Any]) -> Logps:
    """Return what the loss gets of its batch."""
    with torch.no_grad():
        scored = score(batch_for(loss), loss, model(POLICY), attached(REFERENCE), FAST, references_of(loss))
        return scored.inputs_of(loss)


class Batches(LightningDataModule):
    """The same batch in two micro-batches of a step, and in a validation."""

    def __init__(self, batch: PreferenceBatch) -> None:
        super().__init__()
        self.batch = batch
        self.train: list[TokenizedPair] = []
        self.selection: list[TokenizedPair] = []

    def train_dataloader(self) -> Any:
        return DataLoader([Window([self.batch, self.batch], 2 * B)], batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader([self.batch], batch_size=None)  # type: ignore[arg-type]


def trained(loss: Loss[Any], folder: Path) -> Spied:
    """Take a step and a validation with a loss."""
    policy = tiny_llama(POLICY, scale=0.3)
    module = make_module(
        policy, loss=loss, reference=FrozenReference(), reference_model=model(REFERENCE), alpha=ALPHA, beta=BETA
    )
    module.extra_references = references_of(loss)
    make_trainer(folder, val_check_interval=1).fit(module, datamodule=Batches(batch_for(loss)))
    return module


@EACH
def test_example_takes_a_step_and_a_validation(make: type[Loss[Any]], tmp_path: Path) -> None:
    loss = made(make)
    before = copy.deepcopy(loss)
    module = trained(loss, tmp_path)
    logged = {key: float(value) for key, value in module.trainer.callback_metrics.items()}
    wanted = ["train/loss", "val/loss", *(f"{place}/{key}" for place in ("train", "val") for key in loss.extra_metrics)]
    assert all(math.isfinite(logged[key]) for key in wanted)
    assert sum(float(gradient.abs().sum()) for gradient in module.gradients[0].values()) > 0
    if isinstance(loss, nn.Module) and isinstance(before, nn.Module):
        state, initial = loss.state_dict(), before.state_dict()
        assert state and not any(torch.equal(state[name], initial[name]) for name in state)


# ------------------------------------------------------------------------------------------------------- declarations


def rows_of(inputs: Logps, rows: slice) -> Logps:
    return inputs.with_columns({path: values[rows] for path, values in inputs.columns().items()})


def check_declarations(loss: Loss[Any]) -> None:
    """Fail if a loss reads what it does not declare, or returns something else than it has to."""
    inputs = inputs_for(loss)
    settings = {"alpha": ALPHA, "beta": BETA}
    values = loss(inputs, **settings)
    assert values.shape == (B,) and values.isfinite().all()
    assert loss.metrics(inputs, **settings).keys() <= set(loss.metric_names), "extra_metrics"
    for name, is_read in (("alpha", loss.uses_alpha), ("beta", loss.uses_beta)):
        assert torch.equal(loss(inputs, **settings | {name: 0.9}), values) != is_read, name
    half = loss(rows_of(inputs, slice(4)), **settings)
    assert loss.full_batch != bool((half - values[:4]).abs().max() < 1e-9), "full_batch"


@EACH
def test_example_declares_what_it_reads(make: type[Loss[Any]]) -> None:
    check_declarations(made(make))


FORGOTTEN: dict[str, tuple[str, Any, type[Exception], str]] = {
    "TDPO2Loss": ("terms", {}, KeyError, "kl"),
    "RosePOLoss": ("features", {}, KeyError, "flip"),
    "SLiCLoss": ("extra_completions", {}, KeyError, "target"),
    "MRPOLoss": ("extra_references", (), KeyError, "teacher"),
    "AOTLoss": ("full_batch", False, AssertionError, "full_batch"),
    "KTOLoss": ("full_batch", False, AssertionError, "full_batch"),
    "DPOPLoss": ("extra_metrics", (), AssertionError, "extra_metrics"),
    "HingeLoss": ("uses_reference", False, TypeError, "NoneType"),
    "CrowdLoss": ("uses_beta", False, AssertionError, "beta"),
    "ExponentialLoss": ("uses_reference", False, ValueError, "needs reference_chosen"),
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_forgotten_declaration_fails(name: str) -> None:
    attribute, default, error, words = FORGOTTEN[name]
    forgetful = type("Forgetful", (example(name),), {attribute: default})
    with pytest.raises(error, match=words):
        check_declarations(made(forgetful))


def test_term_that_forgets_the_reference_fails() -> None:
    make = example("TDPO2Loss")
    forgetful = {"kl": Term(make.terms["kl"].compute)}
    with pytest.raises(UserError, match="needs_reference_logits"):
        check_declarations(type("Forgetful", (make,), {"terms": forgetful})())


# ------------------------------------------------------------------------------------------------------------- values


def ls(t: Array) -> Array:
    return -np.log1p(np.exp(-t))


def sigmoid(t: Array) -> Array:
    return 1 / (1 + np.exp(-t))


@cache
def token_log_probs(seed: int, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Array:
    """Return the ``(T, V)`` log-probs of the next token at each token of a completion."""
    logits = model(seed)(torch.tensor([prompt + completion])).logits[0].double()
    found: Array = logits.log_softmax(-1)[len(prompt) - 1 : -1].numpy()
    return found


def log_prob(seed: int, side: str) -> Array:
    """Return the ``(B,)`` summed log-probs of the completions of a side."""
    return np.array(
        [
            sum(token_log_probs(seed, row.prompt_ids, ids)[t, token] for t, token in enumerate(ids))
            for row in ROWS
            for ids in [ids_of(row)[side]]
        ]
    )


def ids_of(row: TokenizedPair) -> dict[str, tuple[int, ...]]:
    assert row.rejected_ids is not None
    return {"chosen": row.chosen_ids, "rejected": row.rejected_ids, "other": row.worse_ids[0]}


def forward_kl(side: str) -> Array:
    """Return the ``(B,)`` KL(reference || policy), summed over the tokens of the completions of a side."""

    def of_row(row: TokenizedPair) -> float:
        p, q = (token_log_probs(seed, row.prompt_ids, ids_of(row)[side]) for seed in (POLICY, REFERENCE))
        return float((np.exp(q) * (q - p)).sum())

    return np.array([of_row(row) for row in ROWS])


class Pair:
    """Numbers of the pairs, with the names of ``docs/reference/methods.md``: w is the better side, l the other."""

    def __init__(self, w: str, l: str) -> None:  # noqa: E741
        self.sides = w, l
        self.lp_w, self.lp_l = log_prob(POLICY, w), log_prob(POLICY, l)
        self.lr_w, self.lr_l = log_prob(REFERENCE, w), log_prob(REFERENCE, l)
        self.u_w, self.u_l = self.lp_w - self.lr_w, self.lp_l - self.lr_l
        self.d, self.h = self.lp_w - self.lp_l, self.u_w - self.u_l


def tdpo2(pair: Pair) -> Array:
    kl_w, kl_l = map(forward_kl, pair.sides)
    return -ls(BETA * (pair.h - 0.5 * (kl_l - kl_w)))


def rosepo(pair: Pair) -> Array:
    flip = np.array(COLUMNS["flip_probability"])
    return -(1 - flip) * ls(BETA * pair.h) - flip * ls(-BETA * pair.h)


def mrpo(pair: Pair) -> Array:
    w, l = (  # noqa: E741
        -np.log((np.exp(-log_prob(REFERENCE, side)) + np.exp(-log_prob(TEACHER, side))) / 2) for side in pair.sides
    )
    return -ls(BETA * (pair.d - (w - l)))


def aot(pair: Pair) -> Array:
    # Pairs whose label is certain are not turned with the others.
    given = Pair("chosen", "rejected")
    sign = np.array([-1.0 if label == 0 else 1.0 for label in PREFERENCE])
    certain = np.array([label in (None, 0.0, 1.0) for label in PREFERENCE])
    d = np.where(certain, sign * given.d, pair.d)
    reference = np.where(certain, sign * (given.lr_w - given.lr_l), pair.lr_w - pair.lr_l)
    target = np.empty(B)
    target[np.argsort(d)] = np.sort(reference)
    return -ls(BETA * (d - target))


def bco(pair: Pair) -> Array:
    shift = BETA * np.concatenate([pair.u_w, pair.u_l]).mean()
    return -ls(BETA * pair.u_w - shift) - ls(shift - BETA * pair.u_l)


def crowd(pair: Pair) -> Array:
    trust = sigmoid(np.array(2.0))  # that of every annotator before training
    return -np.log(trust * sigmoid(BETA * pair.h) + (1 - trust) * sigmoid(-BETA * pair.h))


def rewarded(pair: Pair) -> Array:
    head: Any = made(example("RewardedLoss"))

    def reward(side: str) -> Array:
        means = []
        for row in ROWS:
            ids = row.prompt_ids + ids_of(row)[side]
            states = model(POLICY)(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
            means.append(states[len(row.prompt_ids) - 1 : -1].mean(0).numpy())
        return np.stack(means) @ head.head.weight[0].detach().double().numpy()

    w, l = map(reward, pair.sides)  # noqa: E741
    return -ls(BETA * pair.h) - ls(w - l)


FORMULAS: dict[str, Callable[[Pair], Array]] = {
    "TDPO2Loss": tdpo2,
    "RosePOLoss": rosepo,
    "SLiCLoss": lambda pair: np.maximum(0, 1 - pair.d) - 0.1 * log_prob(POLICY, "other"),
    "MRPOLoss": mrpo,
    "AOTLoss": aot,
    "BCOLoss": bco,
    "CrowdLoss": crowd,
    "RewardedLoss": rewarded,
    "DPOPLoss": lambda pair: -ls(BETA * (pair.h - 5 * np.maximum(0, -pair.u_w))),
    "HingeLoss": lambda pair: np.maximum(0, 1 - BETA * pair.h),
    "ExponentialLoss": lambda pair: np.exp(-BETA * pair.h),
}
"""Loss of each pair whose first side is certainly better."""


def kto(label: Array) -> Array:
    u = log_prob(POLICY, "chosen") - log_prob(REFERENCE, "chosen")
    kl = max(0.0, (log_prob(POLICY, "other") - log_prob(REFERENCE, "other")).mean())
    return label * (1 - sigmoid(BETA * (u - kl))) + (1 - label) * (1 - sigmoid(BETA * (kl - u)))


def top_one(label: Array) -> Array:
    chosen, *others = (log_prob(POLICY, side) for side in ("chosen", "rejected", "other"))
    return np.log(sum(np.exp(values - chosen) for values in (chosen, *others)))


@EACH
def test_example_is_its_formula_for_soft_labels_and_weights(make: type[Loss[Any]]) -> None:
    loss = made(make)
    inputs = inputs_for(loss)
    if loss.has_statistics:
        loss.update_statistics(inputs)
    label = np.array([1.0 if p is None else p for p in PREFERENCE])
    weight = np.array([1.0 if w is None else w for w in WEIGHT])
    if isinstance(loss, PreferenceLoss):
        formula = FORMULAS[make.__name__]
        expected = label * formula(Pair("chosen", "rejected")) + (1 - label) * formula(Pair("rejected", "chosen"))
    else:
        expected = {"KTOLoss": kto, "TopOneLoss": top_one}[make.__name__](label)
    with torch.no_grad():
        values = loss(inputs, alpha=ALPHA, beta=BETA)
    np.testing.assert_allclose(values.numpy(), weight * expected, rtol=1e-6, atol=1e-9)


def test_example_trains_on_soft_labels(tmp_path: Path) -> None:
    module = trained(example("HingeLoss")(), tmp_path)
    policy = tiny_llama(POLICY, scale=0.3)

    def log_ratio(row: TokenizedPair, side: str) -> Tensor:
        ids = ids_of(row)[side]
        logps = policy(torch.tensor([row.prompt_ids + ids])).logits[0].log_softmax(-1)[len(row.prompt_ids) - 1 : -1]
        reference = token_log_probs(REFERENCE, row.prompt_ids, ids)[range(len(ids)), list(ids)].sum()
        return logps[range(len(ids)), list(ids)].sum() - reference

    total = torch.zeros((), dtype=torch.float64)
    for row, p, weight in zip(ROWS, PREFERENCE, WEIGHT, strict=True):
        h = BETA * (log_ratio(row, "chosen") - log_ratio(row, "rejected"))
        p, weight = (1.0 if value is None else value for value in (p, weight))
        total = total + weight * (p * (1 - h).clamp(min=0) + (1 - p) * (1 + h).clamp(min=0)) / B
    total.backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(module.gradients[0][name], parameter.grad, rtol=1e-6, atol=1e-9, msg=name)
