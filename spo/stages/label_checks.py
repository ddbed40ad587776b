"""The check that a loss reads the labels and weights of the training data, on log-probs that are made up."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spo.data import TokenizedPair
from spo.errors import UserError
from spo.losses import LabelledLoss, ListLoss, Loss, PreferenceLoss
from spo.types import CompletionLogps, LabelledLogps, ListLogps, Logps, PairLogps

BASES: dict[type[Logps], tuple[type[Loss[Any]], str, str]] = {
    PairLogps: (PreferenceLoss, "of_pairs", "pairs"),
    ListLogps: (ListLoss, "of_ranking", "lists"),
    LabelledLogps: (LabelledLoss, "of_labels", "completions"),
}
"""Class that applies labels and weights to each kind of input, what its subclasses write, and the word for a row."""
MADE_UP_ROWS = 16
MAX_TRIED_VALUES = 8
"""Most values of a column that the check tries."""
MIN_DIFFERENCE = 1e-3
"""Least distance from 1 of a label or weight that has to change the loss in float32."""


def check_labels(pairs: Sequence[TokenizedPair], loss: Loss[Any]) -> None:
    """Refuse a loss that replaces the call of its base class and ignores labels or weights that the data has.

    Args:
        pairs: Rows of the train split.
        loss: Loss of the method.

    Raises:
        UserError: The value of the loss does not depend on a column that is not 1 in some rows.
    """
    if loss.inputs not in BASES:
        return
    base, method, rows = BASES[loss.inputs]
    if type(loss).__call__ is base.__call__:
        return
    has_label = loss.inputs is LabelledLogps or loss.uses_rejected
    label = "label" if loss.inputs is LabelledLogps else "preference"
    for column, words in [(label, "labels")] * has_label + [("weight", "weights")]:
        values = [getattr(pair, column) for pair in pairs]
        other = [value for value in values if value is not None and abs(value - 1) > MIN_DIFFERENCE]
        # A loss may tell good from bad and round soft labels, so both kinds are tried by themselves.
        for group in ([v for v in other if v == 0], [v for v in other if v != 0]):
            if group and ignores(loss, column, group):
                remedy = f"write {method} instead of __call__"
                if not isinstance(loss, base):
                    remedy = f"derive it from spo.losses.{base.__name__}, and {remedy}"
                raise UserError(
                    f"method.loss: {type(loss).__name__} ignores the {words} ({column}) of {len(group):,} of "
                    f"{len(pairs):,} training {rows}: {remedy}"
                )


def ignores(loss: Loss[Any], column: str, values: Sequence[float]) -> bool:
    """Return whether a loss computes the same for each value of a column as for 1, or as for 0 if it is a soft label.

    Args:
        loss: Loss, which is called on copies.
        column: Name of a field of its inputs.
        values: Values that the data has, other than 1: only 0, or none of them 0.
    """
    inputs = made_up(loss)

    def losses_for(value: float, logps: Logps = inputs) -> Tensor:
        # Half of the rows keep 1: a loss may divide weights by their mean.
        of_rows = torch.ones(MADE_UP_ROWS).index_fill(0, torch.arange(0, MADE_UP_ROWS, 2), float(value))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            labelled = logps.with_columns(logps.columns() | {column: of_rows})
            found: Tensor = copy.deepcopy(loss)(labelled, alpha=1.0, beta=1.0)
        return found

    distinct = sorted(set(values))
    tried = distinct[:: -(-len(distinct) // MAX_TRIED_VALUES)]
    try:
        hard = [losses_for(1)]
        if column == "weight" and not hard[0].any():
            return False
        if column == "preference" and torch.equal(hard[0], losses_for(1, _reversed(inputs, loss))):
            return False  # Both outcomes of a label have the same loss.
        if column != "weight" and 0 not in values:
            hard.append(losses_for(0))
        return all(any(torch.equal(losses_for(value), one) for one in hard) for value in tried)
    except Exception:  # Numbers that are made up may be none that the loss can read, which shows nothing.
        return False


def _reversed(logps: Logps, loss: Loss[Any]) -> Logps:
    """Return the other outcome of a label: the pairs swapped, or the lists reversed."""
    if isinstance(logps, ListLogps):
        return replace(logps, order=logps.order.flip(-1))
    assert isinstance(logps, PairLogps)
    return logps.swapped(loss.per_completion_features)


def made_up(loss: Loss[Any]) -> Logps:
    """Return inputs of a loss with all that it declares, of a few rows with random numbers."""
    rows, generator = MADE_UP_ROWS, torch.Generator().manual_seed(0)
    completions = {PairLogps: 2, ListLogps: 3, LabelledLogps: 1}[loss.inputs]

    def numbers(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def logps(*shape: int) -> Tensor:
        return -1 - 6 * numbers(*shape)

    arrange = loss.inputs.arrange
    policy, length = logps(completions, rows), (2 + 5 * numbers(completions, rows)).long()
    reference = logps(completions, rows) if loss.uses_reference else None
    declared: dict[str, Any] = {
        "terms": {name: arrange(logps(completions, rows)) for name in loss.terms},
        "references": {name: arrange(logps(completions, rows)) for name in loss.extra_references},
        "features": {
            name: numbers(rows, *([completions] if one.per_completion else [] if one.size is None else [one.size]))
            for name, one in loss.features.items()
        },
        "extra": {
            name: CompletionLogps(logps(rows), length[0], logps(rows) if loss.uses_reference else None)
            for name in loss.extra_completions
        },
    }
    if loss.inputs is PairLogps:
        return PairLogps(*policy, *((None, None) if reference is None else reference), *length, **declared)
    if loss.inputs is LabelledLogps:
        declared["features"] = {
            name: value[:, 0] if loss.features[name].per_completion else value
            for name, value in declared["features"].items()
        }
        return LabelledLogps(
            policy[0], torch.ones(rows), None if reference is None else reference[0], length[0], **declared
        )
    mask = torch.ones(rows, completions, dtype=torch.bool)
    order = torch.arange(completions).expand(rows, -1)
    return ListLogps(policy.T, mask, order, None if reference is None else reference.T, **declared)
