"""Metrics of a loss on the pairs of the test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spo.batching import chunks
from spo.data import TokenizedPair
from spo.data.collate import collate
from spo.forward.speed import Speed
from spo.losses import Loss
from spo.metrics.calibration import Calibration
from spo.metrics.sums import SumsAndCounts
from spo.models import Reference
from spo.objective import concat_logps, metrics_of, score
from spo.processes import deal, gather
from spo.types import Logps

_NAMES = ("rewards/accuracies", "rewards/margins")


@dataclass(frozen=True)
class Scoring:
    """Loss and models that score the pairs of a finished run, as at its last validation.

    Attributes:
        loss: Loss as trained, with its parameters and statistics.
        coefficients: Values of alpha and beta at the end of training.
        policy: Trained model.
        reference: Reference at the end of training.
        speed: Speed settings, resolved for the models.
        extra_references: Further references that the loss declares, by name.
    """

    loss: Loss[Any]
    coefficients: Mapping[str, float]
    policy: nn.Module
    reference: Reference
    speed: Speed
    extra_references: Mapping[str, Reference] = field(default_factory=dict)


@torch.no_grad()
def pair_metrics(
    scoring: Scoring, pairs: Sequence[TokenizedPair], *, batch_size: int, pad_token_id: int
) -> dict[str, float]:
    """Return accuracy, margin and calibration of the implicit reward on pairs, and the loss's own metrics.

    The processes of a run share the batches, and each returns the metrics of all pairs.

    Args:
        scoring: Loss and models.
        pairs: Pairs of the test split.
        batch_size: Number of pairs in a forward pass.
        pad_token_id: Token for padding.

    Returns:
        Metrics under ``eval/``. Those of two completions are absent for completions without a partner, and calibration
        is absent for lists too.
    """
    if not pairs:
        return {}
    loss, policy, speed = scoring.loss, scoring.policy, scoring.speed
    device = next(policy.parameters()).device
    host = torch.device("cpu")
    own: list[tuple[Logps, Tensor]] = []
    for chunk in deal(list(chunks(pairs, batch_size))):
        batch = collate(chunk, range(len(chunk)), pad_token_id, arrange=speed.arrange).to(device)
        scored = score(batch, loss, policy, scoring.reference, speed, scoring.extra_references)
        own.append((scored.inputs_of(loss).to(host), batch.mask().sum(0).to(host)))
    parts, sizes = zip(*gather(own), strict=True)
    # The loss sees all pairs at once, because its metrics may depend on their company.
    whole = concat_logps(parts, loss.per_completion_features).to(device)
    values = metrics_of(loss, whole, scoring.coefficients["alpha"], scoring.coefficients["beta"])
    names = (*_NAMES, *loss.extra_metrics)
    # NaN marks a missing element, unless it follows from log-probs that are not finite.
    gaps = loss.metric_names if all(value.isfinite().all() for value in whole.columns().values()) else ()
    metric, calibration = SumsAndCounts(names, over_ranks=False, gaps=gaps), Calibration(over_ranks=False)
    metric.update({name: values[name].cpu() for name in names if name in values})
    if "rewards/margins" in values:
        margins, labels = values["rewards/margins"], whole.columns().get("preference")
        # A longer list does not have a single preference.
        of_pairs = (torch.cat(sizes).to(device) == 2) & ~margins.isnan()
        if of_pairs.any():
            calibration.update(margins[of_pairs].cpu(), None if labels is None else labels[of_pairs].cpu())
    reliability = calibration.compute() if calibration.update_called else {}
    found = metric.compute() | {f"calibration/{name}": value for name, value in reliability.items()}
    return {f"eval/{key}": value for key, value in found.items()}
