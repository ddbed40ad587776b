"""Metrics of the implicit reward of a method on pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from spo.data import TokenizedPair
from spo.data.collate import collate
from spo.forward.speed import Speed
from spo.losses import Loss
from spo.metrics.calibration import Calibration
from spo.metrics.sums import SumsAndCounts

_NAMES = ("rewards/accuracies", "rewards/margins")


@torch.no_grad()
def pair_metrics(
    loss: Loss[Any],
    coefficients: Mapping[str, float],
    policy: nn.Module,
    reference: nn.Module,
    pairs: Sequence[TokenizedPair],
    speed: Speed,
    *,
    batch_size: int,
    pad_token_id: int,
) -> dict[str, float]:
    """Return accuracy, margin and calibration of the implicit reward on pairs.

    Args:
        loss: Loss of the method, which defines the implicit reward.
        coefficients: Values of alpha and beta at the end of training.
        policy: Trained model.
        reference: Model that training started from.
        pairs: Pairs of the test split.
        speed: Speed settings, resolved for both models.
        batch_size: Number of pairs in a forward pass.
        pad_token_id: Token for padding.

    Returns:
        Metrics under ``eval/``. Calibration is absent for lists and for completions without a rejected one.
    """
    metric, calibration = SumsAndCounts(_NAMES, over_ranks=False), Calibration(over_ranks=False)
    device = next(policy.parameters()).device
    for first in range(0, len(pairs), batch_size):
        chunk = pairs[first : first + batch_size]
        batch = collate(chunk, range(len(chunk)), pad_token_id, arrange=speed.arrange).to(device)
        inputs = batch.list_logps if loss.uses_lists else batch.pair_logps
        logps = inputs(*(speed.logps(model, batch.sequences) for model in (policy, reference)))
        values = loss.metrics(logps, alpha=coefficients["alpha"], beta=coefficients["beta"])
        metric.update({name: values[name].cpu() for name in _NAMES if name in values})
        if "rewards/margins" in values and len(batch.mask()) == 2:  # a longer list does not have a single preference
            preference = None if batch.preference is None else batch.preference.cpu()
            calibration.update(values["rewards/margins"].cpu(), preference)
    reliability = calibration.compute() if calibration.update_called else {}
    found = metric.compute() | {f"calibration/{name}": value for name, value in reliability.items()}
    return {f"eval/{key}": value for key, value in found.items()}
