"""One test for each property that every method of the package keeps, over all of conf/method.

A new method joins by existing. Its entry in ``KNOWN`` (tests/contract_cases.py) states what follows from its paper.
"""

from __future__ import annotations

import gzip
import inspect
import itertools
import json
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from hydra.utils import get_class
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor, nn

from spo.data.collate import collate
from spo.losses import Feature, Loss
from spo.models import FrozenReference
from spo.objective.joint import leaves_of
from spo.objective.learned import parameters_of, tensors_of, update_statistics
from spo.objective.scored import losses_of, metrics_of
from spo.types import LabelledLogps, ListLogps, Logps, PairLogps, Window
from tests.commands import TINY, spo
from tests.contract_cases import (
    ALPHA,
    BETA,
    FAR,
    KNOWN,
    METHODS,
    POLICY,
    REFERENCE,
    Known,
    known,
    level,
    make_loss,
    node,
    references_of,
    resolved,
    scored,
    seen,
    some_rows,
    speed_of,
    usual,
)
from tests.contract_cases import model as shared_model
from tests.environments import ROOT
from tests.helpers import PAD, Spied, make_data, make_module, make_trainer, run_on_two_ranks, sharded, small_model

COEFFICIENTS: dict[str, Any] = {"alpha": ALPHA, "beta": BETA}
DATA = Path(os.environ.get("SPO_DATA_DIR", ROOT / "../shared/data"))
EACH = pytest.mark.parametrize("name", METHODS)


def values(loss: Loss[Any], logps: Logps) -> Tensor:
    """Return the ``(B,)`` losses, after the statistics of the rows where the loss has some."""
    return losses_of(loss, logps, **COEFFICIENTS)


def slopes(loss: Loss[Any], logps: Logps) -> dict[str, Tensor]:
    """Return the derivative of the sum of the losses by each number of the policy, 0 where there is none."""
    inputs, leaves = leaves_of(logps)
    total = values(loss, inputs).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        path: torch.zeros_like(leaf) if slope is None else slope
        for (path, leaf), slope in zip(leaves.items(), found, strict=True)
    }


def with_statistics(loss: Loss[Any], logps: Logps) -> Loss[Any]:
    """Return the loss after a training step on other numbers, where it has running statistics."""
    if loss.has_statistics:
        update_statistics(loss, leaves_of(logps)[0])
    return loss


def sides(logps: Logps, chosen: float, rejected: float) -> Tensor | tuple[Tensor, Tensor]:
    """Return numbers of the policy's completions: one for chosen, desirable or best ones, one for all others."""
    if isinstance(logps, PairLogps):
        return torch.full_like(logps.policy_chosen, chosen), torch.full_like(logps.policy_chosen, rejected)
    if isinstance(logps, LabelledLogps):
        return torch.where(logps.label == 1, chosen, rejected).to(logps.policy)
    assert isinstance(logps, ListLogps)
    return torch.full_like(logps.policy, rejected).index_fill(1, torch.tensor(0), chosen)


def moved(logps: Logps, chosen: float = 0, rejected: float = 0) -> Logps:
    """Return log-probs after chosen and rejected completions have moved under the policy."""
    change = sides(logps, chosen, rejected)
    if isinstance(logps, PairLogps):
        assert logps.policy_rejected is not None
        return replace(
            logps,
            policy_chosen=logps.policy_chosen + change[0],
            policy_rejected=logps.policy_rejected + change[1],
        )
    assert isinstance(logps, LabelledLogps | ListLogps)
    return replace(logps, policy=logps.policy + change)


def by_side(logps: Logps, found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return derivatives by the log-probs of chosen, and by those of rejected: of each row, or of each completion."""
    if isinstance(logps, PairLogps):
        return found["policy_chosen"], found["policy_rejected"]
    slope = found["policy"]
    if isinstance(logps, LabelledLogps):
        return slope[logps.label == 1], slope[logps.label == 0]
    return slope[:, 0], slope[:, 1:].sum(1)


# --- values and slopes of the definition ----------------------------------------------------------------------------


def test_table_has_only_methods_that_exist() -> None:
    assert KNOWN.keys() <= set(METHODS)


@EACH
def test_value_where_policy_equals_reference(name: str) -> None:
    wanted, loss = known(name), make_loss(name)
    found = values(loss, level(loss))
    torch.testing.assert_close(found, torch.full_like(found, wanted.value), rtol=1e-12, atol=0)
    if loss.uses_reference and wanted.is_constant:
        logps = seen(loss, some_rows(loss, random=False), seeds=(POLICY, POLICY))
        assert values(loss, logps).mean().item() == pytest.approx(wanted.value, rel=1e-9)


@EACH
def test_slope_where_policy_equals_reference(name: str) -> None:
    wanted, loss = known(name), make_loss(name)
    rejected = -wanted.slope if wanted.rejected is None else wanted.rejected
    logps = level(loss)
    for found, slope in zip(by_side(logps, slopes(loss, logps)), (wanted.slope, rejected), strict=True):
        torch.testing.assert_close(found, torch.full_like(found, slope), atol=1e-12, rtol=1e-9)


@EACH
def test_slopes_far_from_the_reference(name: str) -> None:
    """A margin of +-1e4 reaches the limits of the definition; all log-probs stay below zero."""
    wanted, loss = known(name), make_loss(name)
    above, below = wanted.far
    rejected = (-below, -above) if wanted.rejected_far is None else wanted.rejected_far
    logps = level(loss, -2 * FAR)
    cases = [({"chosen": FAR}, 0, above), ({"chosen": -FAR}, 0, below)]
    cases += [({"rejected": FAR}, 1, rejected[0]), ({"rejected": -FAR}, 1, rejected[1])]
    for move, side, slope in cases:
        there = moved(logps, **move)
        assert values(loss, there).isfinite().all()
        found = by_side(there, slopes(loss, there))[side]
        torch.testing.assert_close(found, torch.full_like(found, slope), atol=1e-9, rtol=1e-9, msg=f"{move}")


@EACH
def test_constant_added_to_the_reference(name: str) -> None:
    wanted, loss = known(name), make_loss(name)
    logps = usual(name)
    with_statistics(loss, logps)
    columns = logps.columns()
    shifted = logps.with_columns(
        columns | {path: columns[path] + 3 for path in columns if path.startswith("reference") and "/" not in path}
    )
    change = (values(loss, shifted) - values(loss, logps)).abs().max()
    assert (change < 1e-9) == wanted.cancels


# --- labels and weights ---------------------------------------------------------------------------------------------


def with_label(logps: Logps, label: Tensor) -> Logps:
    if isinstance(logps, LabelledLogps):
        return replace(logps, label=label)
    assert isinstance(logps, PairLogps | ListLogps)
    return replace(logps, preference=label)


def parts_of(loss: Loss[Any]) -> Iterator[Loss[Any]]:
    """Yield a loss, or the losses that it is the sum of."""
    parts = getattr(loss, "losses", {})
    yield from parts.values() if parts else [loss]


def compares(loss: Loss[Any]) -> bool:
    """Return whether all of a loss depends on which completion is better."""
    return all(part.uses_rejected or part.inputs is LabelledLogps for part in parts_of(loss))


def some_labels(loss: Loss[Any], logps: Logps) -> Tensor:
    """Return labels of both kinds and soft ones; all are equal for a loss that spreads a label over other rows."""
    labels = [0.3] * 12 if loss.reads_soft_labels else [1, 0, 0.3] * 4
    return torch.tensor(labels[: len(logps)], dtype=torch.float64)


@EACH
def test_soft_label_is_an_expectation(name: str) -> None:
    loss = make_loss(name)
    logps = usual(name)
    with_statistics(loss, logps)
    label = torch.tensor([1, 0, 0.3] * 4, dtype=torch.float64)[: len(logps)]
    right, wrong, both = (values(loss, with_label(logps, one)) for one in (label.ceil(), label.floor(), label))
    if not any(part.uses_rejected or part.inputs is LabelledLogps for part in parts_of(loss)):
        assert torch.equal(right, wrong)
        return
    is_soft = label == 0.3
    if any(one.each and one.default is None for one in loss.features.values()):
        return  # Numbers of completions take the place of a label.
    assert (both - right).abs()[is_soft].min() > 1e-9 and (both - wrong).abs()[is_soft].min() > 1e-9
    if loss.reads_soft_labels:
        almost = values(loss, with_label(logps, label.clamp(1e-9, 1 - 1e-9)))
        torch.testing.assert_close(almost, both, rtol=1e-6, atol=1e-6)
    elif compares(loss):
        torch.testing.assert_close(both, label * right + (1 - label) * wrong, rtol=1e-12, atol=1e-12)


@EACH
def test_weight_multiplies_the_loss_of_its_row(name: str) -> None:
    loss = make_loss(name)
    logps = usual(name)
    weight = torch.linspace(0, 2, len(logps)).double()
    weighted = values(loss, replace(logps, weight=weight))  # type: ignore[call-arg]
    torch.testing.assert_close(weighted, weight * values(loss, logps), rtol=1e-12, atol=0)


@EACH
def test_exchanged_completions_with_the_opposite_label(name: str) -> None:
    loss = make_loss(name)
    logps = usual(name)
    label = some_labels(loss, logps)
    given = with_label(logps, label)
    if isinstance(given, PairLogps):
        other: Logps = given.swapped(loss.per_completion_features)
    elif isinstance(given, ListLogps):
        other = replace(given, order=given.order.flip(-1), preference=1 - label)
    else:
        return  # A completion without a partner has nothing to be exchanged with.
    if compares(loss):
        theirs, ours = values(loss, other), values(loss, given)
        if loss.reads_soft_labels:
            theirs, ours = theirs.mean(), ours.mean()
        torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)
    if isinstance(given, PairLogps):
        before, after = (metrics_of(loss, one, **COEFFICIENTS) for one in (given, other))
        torch.testing.assert_close(after["rewards/margins"], -before["rewards/margins"])
        torch.testing.assert_close(after["rewards/accuracies"], 1 - before["rewards/accuracies"])


@EACH
def test_rows_depend_on_each_other_as_declared(name: str) -> None:
    loss = make_loss(name)
    together, alone = values(loss, usual(name))[:4], values(loss, seen(loss, some_rows(loss)[:4]))
    assert torch.allclose(together, alone, rtol=1e-9) != loss.full_batch


# --- gradients ------------------------------------------------------------------------------------------------------


def _constant(result: Tensor, *_: Any, **__: Any) -> Tensor:
    return result


def hold(loss: Loss[Any], names: tuple[str, ...], logps: Logps, patch: pytest.MonkeyPatch) -> None:
    """Make methods of a loss return what they return for some rows, whatever they are given."""
    for method in names:
        result = getattr(loss, method)(logps).detach()
        patch.setattr(loss, method, partial(_constant, result))


def differences(loss: Loss[Any], logps: Logps, known: Known, step: float = 1e-5) -> dict[str, Tensor]:
    """Return central differences of the sum of the losses by each number of the policy, 0 for stopped columns."""
    columns = logps.columns()
    found = {}
    for path, value in columns.items():
        if not logps.is_of_policy(path):
            continue
        slope = torch.zeros_like(value)
        for place in range(value.numel()):
            last = place % value.shape[-1] if value.ndim > 1 else None
            if (path, last) in known.stopped:
                continue
            ends = []
            for sign in (1, -1):
                changed = value.clone()
                changed.view(-1)[place] += sign * step
                ends.append(values(loss, logps.with_columns(columns | {path: changed})).sum())
            slope.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
        found[path] = slope
    return found


@EACH
def test_gradient_equals_differences_that_hold_constants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, loss = known(name), make_loss(name)
    logps = seen(loss, some_rows(loss, 5))
    logps = logps.with_columns({path: value.contiguous() for path, value in logps.columns().items()})
    with_statistics(loss, logps)
    exact = slopes(loss, logps)
    with torch.no_grad():
        free = differences(loss, logps, Known(0, 0, (0, 0)))
        hold(loss, wanted.held, logps, monkeypatch)
        held = differences(loss, logps, wanted)
    assert exact.keys() == held.keys()
    for path, slope in exact.items():
        torch.testing.assert_close(slope, held[path], rtol=1e-6, atol=1e-7, msg=lambda m, p=path: f"{p}: {m}")
    is_free = all(torch.allclose(free[path], slope, rtol=1e-6, atol=1e-7) for path, slope in exact.items())
    assert is_free != bool(wanted.held or wanted.stopped), "the table holds what the loss does not stop"


@EACH
def test_gradient_reaches_the_policy_and_the_parameters_alone(name: str) -> None:
    loss = make_loss(name)
    rows = some_rows(loss, 5)
    policy = small_model(POLICY)
    others = [shared_model(REFERENCE), *(one.model for one in references_of(loss, 2).values())]
    for other in others:
        other.requires_grad_(True)
    try:
        scores = scored(loss, rows, policy=policy, layout="padded")
        values(loss, scores.inputs_of(loss)).sum().backward()
    finally:
        slopes_of_others = [p.grad for other in others for p in other.parameters()]
        for other in others:
            other.requires_grad_(False)
            other.zero_grad()
    assert slopes_of_others and all(slope is None for slope in slopes_of_others)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters_of(loss))


def choices(name: str) -> Iterator[tuple[str, Any]]:
    """Yield the options of a method that are a choice, with each choice that its yaml does not make."""
    config = node(name).loss
    for key, hint in get_type_hints(vars(get_class(config["_target_"])).get("__init__", object)).items():
        given = get_args(hint) if get_origin(hint) is Literal else (True, False) if hint is bool else ()
        yield from ((key, choice) for choice in given if choice != config.get(key))


OPTIONS = [pytest.param(name, {}, id=name) for name in METHODS]
OPTIONS += [pytest.param(name, {key: one}, id=f"{name}-{key}={one}") for name in METHODS for key, one in choices(name)]


def extreme(loss: Loss[Any], logps: Logps, highest: float, dtype: torch.dtype) -> Logps:
    """Return 32 rows whose log-probs are all +-1e4."""
    generator = torch.Generator().manual_seed(1)
    places = torch.arange(32) % len(logps)
    columns = {}
    for path, value in logps.columns().items():
        value = value[places]
        if path.rpartition("/")[2].startswith(("policy", "reference")) or path.startswith("references/"):
            is_high = torch.rand(value.shape, generator=generator) > 0.5
            value = torch.where(is_high, highest, -FAR).to(value) if not path.startswith("terms/") else value
        columns[path] = value.to(dtype) if value.is_floating_point() else value
    return logps.with_columns(columns)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_extreme_log_probs_have_finite_losses_and_gradients(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """A method keeps it with every choice of its options, such as the divergence of f-DPO."""
    wanted, loss = known(name), make_loss(name, dtype, **options)
    logps = extreme(loss, seen(loss, some_rows(loss)), wanted.highest, dtype)
    for label in (0.0, 0.3, 1.0):
        given = with_label(logps, torch.full((32,), label, dtype=dtype))
        with_statistics(loss, given)
        found = values(loss, given)
        assert found.dtype == dtype and found.isfinite().all()
        for path, slope in slopes(loss, given).items():
            assert slope.isfinite().all(), path
        for key, metric in metrics_of(loss, given, **COEFFICIENTS).items():
            assert metric.isfinite().all() or isinstance(logps, LabelledLogps), key


@EACH
def test_half_precision_logits_give_single_precision_losses(name: str) -> None:
    loss = make_loss(name, torch.float32)
    rows = some_rows(loss)
    half, single = (seen(loss, rows, dtype=dtype, layout="padded") for dtype in (torch.bfloat16, torch.float32))
    with_statistics(loss, single)
    ours, theirs = values(loss, half), values(loss, single)
    assert ours.dtype == torch.float32 and ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0.2, atol=0.2 * float(theirs.abs().mean()))


# --- inputs and metrics ---------------------------------------------------------------------------------------------


@EACH
def test_inputs_stay_as_they_are(name: str) -> None:
    loss = make_loss(name)
    logps = seen(loss, some_rows(loss, soft=True))
    before = {path: value.clone() for path, value in logps.columns().items()}
    with_statistics(loss, logps)
    first = values(loss, logps)
    metrics_of(loss, logps, **COEFFICIENTS)
    assert torch.equal(values(loss, logps), first)
    for path, value in logps.columns().items():
        assert torch.equal(value, before[path]), path


@EACH
def test_metrics_are_declared_finite_and_consistent(name: str) -> None:
    loss = make_loss(name)
    logps = usual(name)
    found = metrics_of(loss, logps, **COEFFICIENTS)
    assert found.keys() <= set(loss.metric_names) and found.keys() >= set(loss.extra_metrics)
    if isinstance(logps, LabelledLogps):
        is_good = logps.label > 0.5
        for key, rows in {"chosen": is_good, "rejected": ~is_good}.items():
            assert found[f"rewards/{key}"][rows].isfinite().all() and found[f"rewards/{key}"][~rows].isnan().all()
            assert torch.equal(found[f"logps/{key}"][rows], logps.policy[rows])
        assert all(found[key].isfinite().all() for key in loss.extra_metrics)
        return
    assert all(value.isfinite().all() for value in found.values())
    chosen, rejected = found["rewards/chosen"], found["rewards/rejected"]
    torch.testing.assert_close(found["rewards/margins"], chosen - rejected)
    if isinstance(logps, PairLogps):
        assert torch.equal(found["rewards/accuracies"], (chosen > rejected).float())
        assert torch.equal(found["logps/chosen"], logps.policy_chosen)
    assert torch.equal(
        found["logps/chosen"], logps.policy_chosen if isinstance(logps, PairLogps) else logps.policy[:, 0]
    )  # type: ignore[attr-defined]


# --- layouts, micro-batches and processes ---------------------------------------------------------------------------


@EACH
def test_padding_and_order_do_not_matter(name: str) -> None:
    loss = make_loss(name)
    rows = some_rows(loss, soft=True)
    packed = seen(loss, rows)
    with_statistics(loss, packed)
    wanted = values(loss, packed)
    torch.testing.assert_close(values(loss, seen(loss, rows, layout="padded")), wanted, rtol=1e-10, atol=1e-10)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    mixed = values(loss, seen(loss, [rows[i] for i in order], layout="padded"))
    torch.testing.assert_close(mixed, wanted[order], rtol=1e-10, atol=1e-10)


BATCH, STEPS = 6, 2


@cache
def shared_policy() -> nn.Module:
    return resolved(small_model(POLICY))


@cache
def shared_trainer() -> Trainer:
    return make_trainer(Path("unused"))


def module_of(name: str, policy: nn.Module, layout: str = "packed", micro: int | None = None) -> Spied:
    """Return the module that trains a policy with a method."""
    loss = make_loss(name)
    module = make_module(
        policy,
        loss=loss,
        reference=FrozenReference(),
        reference_model=shared_model(REFERENCE),
        speed=speed_of(layout),
        micro_batch_size=micro,
        **COEFFICIENTS,
    )
    module.extra_references = references_of(loss, 2)
    return module


def fitted(folder: Path, name: str, micro: int | None = None, **trainer: Any) -> list[dict[str, Tensor]]:
    """Train with a method, on rows of which some have soft labels and weights, and return each step's gradients."""
    module = module_of(name, small_model(POLICY), micro=micro)
    rows = some_rows(module.loss, soft=True)
    data = make_data(rows, max_steps=STEPS, batch_size=BATCH, micro_batch_size=micro)
    make_trainer(folder, max_steps=STEPS, **trainer).fit(module, datamodule=data)
    return module.gradients


def gradients(name: str, layout: str = "packed", micro: int = BATCH) -> list[dict[str, Tensor]]:
    """Return the gradients of the pairs of two windows, by the policy as it begins."""
    module = module_of(name, shared_policy(), layout, micro)
    module.trainer = shared_trainer()  # It tells the number of processes.
    rows, found = some_rows(module.loss, 2 * BATCH, soft=True), []
    for first in range(0, len(rows), BATCH):
        places = [range(i, min(i + micro, first + BATCH)) for i in range(first, first + BATCH, micro)]
        batches = [collate([rows[i] for i in part], part, PAD, arrange=speed_of(layout).arrange) for part in places]
        for term in module.pairs.terms(Window(batches, BATCH), 0):
            term().backward()
        named = [*module.policy.named_parameters(), *tensors_of(module.loss).items()]
        found.append({key: p.grad.clone() for key, p in named if p.grad is not None})
        module.zero_grad()
    return found


def assert_same_gradients(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    """Compare with the largest gradient of a step, to 1e-12 of it."""
    assert len(ours) == len(theirs) == STEPS
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        largest = max(float(slope.abs().max()) for slope in other.values())
        assert largest > 1e-6
        for key, slope in one.items():
            torch.testing.assert_close(slope, other[key], rtol=0, atol=1e-12 * largest, msg=lambda m, k=key: k + m)


@EACH
def test_micro_batches_and_padding_do_not_change_a_step(name: str) -> None:
    assert_same_gradients(gradients(name, layout="padded", micro=2), gradients(name))


WAYS: tuple[tuple[str, int | None], ...] = (("ddp", None), ("ddp", 2), ("fsdp", 2))  # The last one shards models.


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """All methods share one pair of processes, with whole and with sharded models."""
    run_on_two_ranks(__name__, tmp_path)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name in METHODS:
        alone = fitted(tmp_path, name)
        for strategy, micro in WAYS:
            assert_same_gradients(two[name, strategy, micro], alone)


# --- the command ----------------------------------------------------------------------------------------------------

ALL = f"method={','.join(METHODS)}"
LITTLE = ["judge=none", "logger=record", "trainer.max_steps=3", "trainer.val_check_interval=3"]
LITTLE += [
    "data.max_new_tokens=16",
    "evaluation.num_prompts=2",
    "evaluation.selection_prompts=2",
    "probe.num_prompts=2",
]


def check_runs(sweep: Path, methods: Sequence[str]) -> None:
    """Check that each method has a run that is finished, with finite metrics, and that its policy has moved."""
    runs = [path.parent for path in sweep.glob("*/metrics.json")]
    folders = {str(yaml.safe_load((run / "config.yaml").read_text())["method"]["name"]): run for run in runs}
    assert folders.keys() == set(methods)
    for name, run in folders.items():
        metrics = json.loads((run / "metrics.json").read_text())
        assert {"train/loss", "val/loss", "eval/kl"} <= metrics.keys(), name
        assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float)), name
        assert metrics["train/grad_norm"] > 0, name


@pytest.mark.parametrize(
    "first",
    [pytest.param(0, marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2))],
)
def test_every_third_method_trains_in_one_process(first: int, cache_dir: Path, tmp_path: Path) -> None:
    methods = METHODS[first::3]
    words = [TINY, f"method={','.join(methods)}", *LITTLE, "sft.max_steps=10", "hydra.sweep.dir=sweep"]
    spo("train", "-m", *words, folder=tmp_path, cache=cache_dir)
    check_runs(tmp_path / "sweep", methods)


def with_columns(path: Path, out: Path, rows: int) -> Path:
    """Copy pairs, with a number in each column that a method needs and that its loss does not make."""
    columns: dict[str, Feature] = {}
    for name in METHODS:
        for one in make_loss(name).features.values():
            if one.make is None:
                columns |= dict.fromkeys(one.columns, one)
    generator = random.Random(0)
    with gzip.open(path, "rt") as lines:
        given = [json.loads(line) for line in itertools.islice(lines, rows)]
    found = [row | {name: round(generator.random(), 3) for name in columns} for row in given]
    out.write_text("".join(json.dumps(row) + "\n" for row in found))
    return out


@pytest.mark.nightly
def test_every_method_trains_on_real_pairs_in_one_process(cache_dir: Path, tmp_path: Path) -> None:
    model, pairs = DATA / "stories260K", DATA / "alpaca_eval_pairs.train.jsonl.gz"
    if not (model.exists() and pairs.exists()):
        pytest.skip("no SPO_DATA_DIR")
    rows = with_columns(pairs, tmp_path / "pairs.jsonl", 200)
    words = [TINY, ALL, *LITTLE, "model=hf", f"model.path={model}", "data=jsonl", f"data.path={rows}"]
    words += ["data.truncation=trim_completion", "data.batch_size=4", "data.limit=200", "data.splits.selection=0.2"]
    spo("train", "-m", *words, "hydra.sweep.dir=sweep", folder=tmp_path, cache=cache_dir)
    check_runs(tmp_path / "sweep", METHODS)


# --- yaml, docstring and README -------------------------------------------------------------------------------------


def targets(config: Any) -> Iterator[DictConfig]:
    """Yield every part of a yaml that names a target."""
    if isinstance(config, DictConfig):
        if "_target_" in config:
            yield config
        for key in config:
            yield from targets(config[key])


@EACH
def test_yaml_has_the_parameters_of_its_targets(name: str) -> None:
    for one in targets(node(name).loss):
        if one.get("_partial_"):
            continue
        parameters = set(inspect.signature(get_class(one["_target_"])).parameters)
        assert {str(key) for key in one} - {"_target_"} == parameters, one["_target_"]


@EACH
def test_docstring_has_the_paper_and_an_equation(name: str) -> None:
    config = node(name)
    loss = get_class(config.loss["_target_"])
    document = inspect.getdoc(loss) or ""
    assert ".. math::" in document
    same = [node(other) for other in METHODS]
    papers = {one.paper for one in same if one.loss["_target_"] == config.loss["_target_"]}
    # A second name of a formula is a yaml alone, whose paper its class need not cite.
    assert config.paper in document or any(paper and paper in document for paper in papers), config.paper
    if str(config.get("checked", "")).startswith("reconstruction"):
        assert "reconstruction" in document


@EACH
def test_readme_has_a_row(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "README.md").read_text(), "run: make tables"


if __name__ == "__main__":
    [out] = map(Path, sys.argv[1:])
    both = {
        (name, way, micro): fitted(out, name, micro, devices=2, strategy=sharded() if way == "fsdp" else way)
        for way, micro in WAYS
        for name in METHODS
    }
    if torch.distributed.get_rank() == 0:
        torch.save(both, out / "two.pt")
