"""Metrics of the implicit reward of a method on pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spo.data import TokenizedPair
from spo.data.collate import collate
from spo.forward.speed import Speed
from spo.losses import Loss
from spo.metrics.calibration import Calibration
from spo.metrics.sums import SumsAndCounts
from spo.objective import concat_logps, loss_inputs
from spo.types import Logps

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
    if not pairs:
        return {}
    device = next(policy.parameters()).device
    parts: list[Logps] = []
    sizes: list[Tensor] = []
    for first in range(0, len(pairs), batch_size):
        chunk = pairs[first : first + batch_size]
        batch = collate(chunk, range(len(chunk)), pad_token_id, arrange=speed.arrange).to(device)
        ours, theirs = (speed.logps(model, batch.sequences) for model in (policy, reference))
        parts.append(loss_inputs(loss, batch, ours, theirs))
        sizes.append(batch.mask().sum(0))
    # The loss sees all pairs at once, because its metrics may depend on their company.
    whole = concat_logps(parts)
    values = loss.metrics(whole, alpha=coefficients["alpha"], beta=coefficients["beta"])
    metric, calibration = SumsAndCounts(_NAMES, over_ranks=False), Calibration(over_ranks=False)
    metric.update({name: values[name].cpu() for name in _NAMES if name in values})
    is_pair = torch.cat(sizes) == 2  # a longer list does not have a single preference
    if "rewards/margins" in values and is_pair.any():
        labels = whole.columns().get("preference")
        preference = None if labels is None else labels[is_pair].cpu()
        calibration.update(values["rewards/margins"][is_pair].cpu(), preference)
    reliability = calibration.compute() if calibration.update_called else {}
    found = metric.compute() | {f"calibration/{name}": value for name, value in reliability.items()}
    return {f"eval/{key}": value for key, value in found.items()}
