"""The shipped methods as the contract test sees them: their losses, rows and log-probs that fit what they declare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from spo.data import TokenizedPair
from spo.data.collate import collate
from spo.forward.speed import Speed
from spo.losses import Loss
from spo.losses.declarations import Feature
from spo.models import FrozenReference
from spo.objective import ScoredBatch, score
from spo.resources import conf_dir
from spo.types import CompletionLogps, LabelledLogps, ListLogps, Logps, PairLogps
from tests.helpers import FAST, PAD, PLAIN, frozen, random_pairs, small_model

FILES = {path.stem: path for path in sorted(conf_dir().glob("method/*.yaml"))}
METHODS = list(FILES)
ALPHA, BETA = 0.4, 0.3
POLICY, REFERENCE, FURTHER = range(3)
"""Random seeds of the models."""
ROWS, LIST_SIZE = 4, 3
LOGP, LENGTH = -6.0, 3.0
"""Log-prob and number of tokens of every completion at the point that :data:`KNOWN` describes."""
FAR = 1e4


@dataclass(frozen=True)
class Known:
    """Numbers of a method that follow from its definition, with the defaults of its yaml, ALPHA and BETA.

    They hold where all completions have the log-prob LOGP under all models and LENGTH tokens, the terms are 0, and the
    features are those of :func:`numbers`. "Chosen" are desirable completions in labelled data, and the best one of a
    list, and "rejected" are all others together.

    Attributes:
        value: Loss of each row.
        slope: Derivative by the log-prob of chosen.
        far: Derivatives by the log-prob of chosen where it is FAR above, and FAR below.
        rejected: Derivative by the log-probs of rejected, if it is not ``-slope``.
        rejected_far: Derivatives where rejected is FAR above, and FAR below, if they are not those of a function of the
            margin, ``(-far[1], -far[0])``.
        is_constant: The value is that of all completions wherever the policy equals its references.
        cancels: A constant that is added to all log-probs of the reference cancels.
        held: Methods of the loss whose results are constant in the gradient.
        stopped: Columns without a gradient, each with a position in its last dimension.
        highest: Highest log-prob for which the loss is defined.
    """

    value: float
    slope: float
    far: tuple[float, float]
    rejected: float | None = None
    rejected_far: tuple[float, float] | None = None
    is_constant: bool = True
    cancels: bool = True
    held: tuple[str, ...] = ()
    stopped: tuple[tuple[str, int], ...] = ()
    highest: float = FAR


def _sigmoid(t: float) -> float:
    return 1 / (1 + math.exp(-t))


def _softplus(t: float) -> float:
    return math.log1p(math.exp(t))


A, B, ETA, L2, NLL = ALPHA, BETA, 1 / BETA, math.log(2), -LOGP / LENGTH
ODDS = 1 / (1 - math.exp(-NLL))
"""Derivative of the log-odds of a token by its log-prob."""
DPO = Known(L2, -B / 2, (0, -B))
UPO_WEIGHT = math.exp(0.25)

# Column "value": log 2, 1/(4 tau^2), ... of the definitions; the slopes are derivatives of the same formulas.
KNOWN: dict[str, Known] = {
    "alpha_dpo": Known(
        _softplus(0.6 * B),
        -B * _sigmoid(0.6 * B) / LENGTH,
        (0, -B / LENGTH),
        cancels=False,
        held=("target_margins",),
        is_constant=False,
    ),
    "alpha_spin": DPO,
    "aot": DPO,
    "aot_unpaired": DPO,
    "apo_down": Known(1, 0, (0, 0), rejected=B / 4, cancels=False),
    "apo_zero": Known(1, -B / 4, (0, 0), cancels=False),
    "aps": Known(0.1 * L2 - 0.2 * 0.1, -B / 2, (0, -B)),
    "bapo": DPO,
    "bco": Known(L2, -B / 2, (0, -B), cancels=False),
    "cdpo": Known(L2, -(1 - 2 * 0.2) * B / 2, (0.2 * B, -0.8 * B)),
    "cpo": Known(L2 - LOGP, -B / 2 - 1, (-1, -B - 1), rejected=B / 2, rejected_far=(B, 0)),
    "discopop": Known((L2 + 1) / 2, B * ((1 - L2) / (4 * 0.05) - 3 / 4), (0, -B)),
    "dpo": DPO,
    "dpo_length_normalized": Known(L2, -B / 2 / LENGTH, (0, -B / LENGTH), cancels=False),
    "dpo_nll": Known(
        L2 + NLL,
        -B / 2 - 1 / LENGTH,
        (-1 / LENGTH, -B - 1 / LENGTH),
        rejected=B / 2,
        rejected_far=(B, 0),
        is_constant=False,
    ),
    "exo": Known(-L2 - math.log(1e-3 * (1 - 1e-3)) / 2, B / 4 * math.log(1e-3 / (1 - 1e-3)), (0, 0)),
    "exo_rw": Known(
        math.log(math.exp(0.5) + 1 + math.exp(-0.5)) - math.log(3),
        -B / 6,
        (0, 0),
    ),
    "f_dpo": Known(L2, -B / 4, (0, -B), rejected_far=(0, 0), cancels=False),
    "hinge": Known(1, -B, (0, -B)),
    "ipo": Known(
        ETA**2 / 4,
        -ETA / LENGTH,
        ((2 * FAR / LENGTH - ETA) / LENGTH, (-2 * FAR / LENGTH - ETA) / LENGTH),
        cancels=False,
    ),
    "ipo_sum": Known(ETA**2 / 4, -ETA, (2 * FAR - ETA, -2 * FAR - ETA)),
    "kto": Known(1 / 2, -B / 4, (0, 0), cancels=False, held=("reference_point",)),
    "ld_dpo": Known(L2, -B / 4, (0, -B / 2)),
    "minor_dpo": Known(L2, -B / 2, (0, -B), rejected=0, rejected_far=(B, 0), cancels=False),
    "mix": Known(
        L2 + 0.2 * NLL,
        -B / 2 - 0.2 / LENGTH,
        (-0.2 / LENGTH, -B - 0.2 / LENGTH),
        rejected=B / 2,
        rejected_far=(B, 0),
        is_constant=False,
    ),
    "mrpo": Known(L2, -B / 2, (0, -B), cancels=False),
    "nca": Known(2 * L2, -B / 4, (B / 2, -B), rejected_far=(B / 2, 0), cancels=False),
    "orpo": Known(
        NLL + B * L2,
        -(1 + B / 2 * ODDS) / LENGTH,
        (-1 / LENGTH, -(1 + B) / LENGTH),
        rejected=B / 2 * ODDS / LENGTH,
        rejected_far=(B / LENGTH, 0),
        highest=-1e-3,
    ),
    "rdpo": Known(L2, -B / 2 / 0.8, (-0.1 * B / 0.8, -0.9 * B / 0.8)),
    "rosepo": Known(L2, -B / 4, (B / 4, -3 * B / 4)),
    "rpo": Known(L2, -B / 2 / ROWS, (0, -B / ROWS)),
    "rpo_unpaired": DPO,
    "rso_hinge": Known(1, -B, (0, -B)),
    "self_supervised_po": replace(DPO, is_constant=False),
    "sequential_po": Known(_softplus(0.5), -B * _sigmoid(0.5), (0, -B)),
    "sft": Known(-LOGP, -1, (-1, -1), rejected=0, rejected_far=(0, 0)),
    "simpo": Known(_softplus(0.55 * B), -B * _sigmoid(0.55 * B) / LENGTH, (0, -B / LENGTH)),
    "slic": Known(B - 0.1 * LOGP, -1.1, (-0.1, -1.1), rejected=1, rejected_far=(1, 0)),
    "spin": DPO,
    "spl": Known(L2, -A / 2, (0, -A), is_constant=False),
    "spo": Known(L2 / A, -1 / 2, (0, -1)),
    "spo_best_of_n": Known(math.log(3) / A, -2 / 3, (0, -1)),
    "spo_ranked": Known(math.log(6) / A, -2 / 3, (0, -1)),
    "spo_weighted": Known(L2 / A, -1 / 2, (0, -1), held=("weights",)),
    "sppo": Known(ETA**2 / 4, -ETA / 2, (FAR - ETA / 2, -FAR - ETA / 2), cancels=False),
    "sppo_soft": Known(ETA**2 / 16, -ETA / 4, (FAR - ETA / 4, -FAR - ETA / 4), cancels=False),
    "tdpo1": DPO,
    "tdpo2": replace(DPO, stopped=(("terms/kl", 0),)),
    "tr_dpo": DPO,
    "upo": Known(
        1 / 2 - UPO_WEIGHT * LOGP + 0.7 * 0.25**2,
        -B / 4 - UPO_WEIGHT,
        (-UPO_WEIGHT, -UPO_WEIGHT),
        rejected=B / 4 - UPO_WEIGHT,
        rejected_far=(-UPO_WEIGHT, -UPO_WEIGHT),
        cancels=False,
        held=("reference_point", "weights"),
        is_constant=False,
    ),
    "wpo": replace(DPO, held=("weights",), is_constant=False),
}


def known(name: str) -> Known:
    """Return the numbers of a method.

    Raises:
        LookupError: The table does not have the method.
    """
    if name not in KNOWN:
        raise LookupError(
            f"conf/method/{name}.yaml has no entry in tests/contract_cases.py: add KNOWN[{name!r}] with the value, the "
            "slopes and the slopes far away that the paper's formula has where the policy equals the reference"
        )
    return KNOWN[name]


@cache
def node(name: str) -> DictConfig:
    """Return the yaml of a method."""
    found = OmegaConf.load(FILES[name])
    assert isinstance(found, DictConfig)
    return found


def make_loss(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Make the loss of a method as a run does, for the policy of these tests."""
    loss = instantiate(node(name).loss, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss.fit_width(model(POLICY).config.n_embd)
    return loss.to(dtype) if isinstance(loss, nn.Module) else loss


@cache
def model(seed: int, dtype: torch.dtype = torch.float64) -> Any:
    return resolved(small_model(seed, dtype))


def resolved(of: nn.Module) -> nn.Module:
    """Return a model that takes packed rows from now on."""
    FAST.resolve_for(of)
    return of


@cache
def speed_of(layout: str) -> Speed:
    return {"padded": PLAIN, "packed": FAST}[layout].resolve_for(small_model(0))


def numbers(feature: Feature, completions: int, generator: torch.Generator | None) -> Any:
    """Return random numbers of a row, or without a generator those of :data:`KNOWN`: 0.75 to 0.25, or 0.25 for one."""
    count = feature.size or (completions if feature.per_completion else 1)
    if generator is not None:
        found = torch.rand(count, generator=generator).tolist()
    else:
        found = torch.linspace(0.75, 0.25, count).tolist() if count > 1 else [0.25]
    return found[0] if feature.size is None and not (feature.per_completion and completions > 1) else tuple(found)


def some_rows(loss: Loss[Any], count: int = 11, *, soft: bool = False, random: bool = True) -> list[TokenizedPair]:
    """Return rows with what a loss declares of its data.

    Args:
        loss: Loss.
        count: Number of rows, some of which share a prompt and completions.
        soft: Give some of the rows a soft label and a weight. No completion is on the same side of two labels,
            because AOT orders ties in no particular way.
        random: Draw the features; otherwise they are those of :data:`KNOWN`.
    """
    generator = torch.Generator().manual_seed(3) if random else None
    pairs = random_pairs(
        count,
        seed=1,
        preference=lambda i: None if i % 2 or not soft else (0.7 - i / 20 if i else 0.0),
        weight=lambda i: None if i > 5 or not soft else 0.5 + i / 10,
    )
    pairs[3:5] = [replace(pair, prompt_ids=pairs[2].prompt_ids, prompt_id=pairs[2].prompt_id) for pair in pairs[3:5]]
    pairs[4] = replace(pairs[4], chosen_ids=pairs[2].rejected_ids)
    rows = []
    for i, pair in enumerate(pairs):
        columns: dict[str, Any] = {
            "extra": {
                key: pairs[(i + 5 + place) % count].chosen_ids for place, key in enumerate(loss.extra_completions)
            }
        }
        if loss.inputs is ListLogps and (not random or i % 3):
            columns["worse_ids"] = (pairs[i - 1].chosen_ids,)
        completions = 1 if loss.inputs is LabelledLogps else 2 + len(columns.get("worse_ids", ()))
        found = {key: numbers(one, completions, generator) for key, one in loss.features.items()}
        several = set(loss.per_completion_features) if completions > 1 else set()
        columns["numbers"] = {key: value for key, value in found.items() if key in several}
        columns["features"] = {key: value for key, value in found.items() if key not in several}
        if loss.inputs is LabelledLogps:
            label = 0.2 + i / 20 if soft and i % 3 == 2 else float(i % 3 > 0)
            columns |= {"rejected_ids": None, "rejected_text": None, "preference": None, "label": label}
        rows.append(replace(pair, **columns))
    return rows


def references_of(loss: Loss[Any], seed: int, dtype: torch.dtype = torch.float64) -> dict[str, FrozenReference]:
    """Return a model for each further reference that a loss declares."""
    return {name: attached(model(seed, dtype)) for name in loss.extra_references}


def attached(of: nn.Module) -> FrozenReference:
    reference = FrozenReference()
    reference.attach(lambda: frozen(of))
    return reference


def scored(
    loss: Loss[Any],
    rows: Sequence[TokenizedPair],
    *,
    policy: nn.Module | None = None,
    seeds: tuple[int, int] = (REFERENCE, FURTHER),
    dtype: torch.dtype = torch.float64,
    layout: str = "packed",
) -> ScoredBatch:
    """Run the policy and the references on rows, as far as a loss declares them."""
    speed = speed_of(layout)
    batch = collate(rows, range(len(rows)), PAD, arrange=speed.arrange)
    policy = model(POLICY, dtype) if policy is None else policy
    reference = attached(model(seeds[0], dtype))
    return score(batch, loss, policy, reference, speed, references_of(loss, seeds[1], dtype))


@torch.no_grad()
def seen(loss: Loss[Any], rows: Sequence[TokenizedPair], **options: Any) -> Logps:
    """Return what a loss reads of rows."""
    return scored(loss, rows, **options).inputs_of(loss)


@cache
def usual(name: str) -> Logps:
    """Return what the loss of a method reads of random rows."""
    loss = make_loss(name)
    return seen(loss, some_rows(loss))


def level(loss: Loss[Any], logp: float = LOGP, dtype: torch.dtype = torch.float64) -> Logps:
    """Return ROWS rows at the point that :data:`KNOWN` describes, with another log-prob."""

    def full(*shape: int, value: float = logp) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    completions = {PairLogps: 2, LabelledLogps: 1, ListLogps: LIST_SIZE}[loss.inputs]
    shape = {PairLogps: (2, ROWS), LabelledLogps: (ROWS,), ListLogps: (ROWS, LIST_SIZE)}[loss.inputs]
    row = full(ROWS)
    more: dict[str, Any] = {
        "terms": {name: full(*shape, value=0) for name in loss.terms},
        "references": {name: full(*shape) for name in loss.extra_references},
        "features": {
            name: torch.tensor([numbers(one, completions, None)] * ROWS, dtype=dtype)
            for name, one in loss.features.items()
        },
        "extra": {name: CompletionLogps(row, full(ROWS, value=LENGTH), row) for name in loss.extra_completions},
    }
    reference, length = row if loss.uses_reference else None, full(ROWS, value=LENGTH)
    if loss.inputs is PairLogps:
        return PairLogps(row, row, reference, reference, length, length, **more)
    if loss.inputs is LabelledLogps:
        return LabelledLogps(row, torch.arange(ROWS) % 2 * torch.ones_like(row), reference, length, **more)
    every = full(ROWS, LIST_SIZE)
    order = torch.arange(LIST_SIZE).expand(ROWS, -1)
    return ListLogps(
        every, torch.ones_like(every, dtype=torch.bool), order, every if loss.uses_reference else None, **more
    )
