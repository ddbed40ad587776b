"""The check that a run trained what its record says, before the run is finished."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spo.callbacks import Stop
from spo.data import TokenizedPair
from spo.errors import UserError
from spo.losses import Loss
from spo.metrics.trained import PREFIX
from spo.models.saving import HALF_PRECISION
from spo.notes import note
from spo.stages.label_checks import check_labels
from spo.wording import number

SAMPLED_WEIGHTS = 4096
"""Weights of each tensor whose values are kept, to estimate the share of weights that training changed."""
MIN_CHANGED_SHARE = 0.5
"""Share of changed weights in half precision below which a note says that updates were lost."""


class Fingerprint(NamedTuple):
    """A tensor in a few bytes.

    Attributes:
        checksum: Sum of the bit patterns of all values, which any change alters with near certainty.
        sample: Values at regular places, on the host.
        size: Number of values.
    """

    checksum: int
    sample: Tensor
    size: int


class Start:
    """The trainable weights before training, as fingerprints.

    Args:
        policy: Policy before training. If it is sharded, all processes take part.
    """

    def __init__(self, policy: nn.Module) -> None:
        trained = ((name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad)
        self.fingerprints = {name: fingerprint(_whole(parameter.detach())) for name, parameter in trained}

    def changed_share(self, weights: Mapping[str, Tensor]) -> float:
        """Return the estimated share of trainable weights that differ now; 0 only if every weight is the same.

        Args:
            weights: Weights after training, by name.
        """
        changed = total = 0.0
        for name, before in self.fingerprints.items():
            after = fingerprint(weights[name])
            share = float((before.sample != after.sample).double().mean())
            if before.checksum != after.checksum:
                share = max(share, 1 / before.size)
            changed, total = changed + before.size * share, total + before.size
        return changed / total


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


@torch.no_grad()
def fingerprint(weight: Tensor) -> Fingerprint:
    """Return the fingerprint of a tensor of floating-point numbers."""
    flat = weight.detach().reshape(-1)
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    sample = flat[:: max(len(flat) // SAMPLED_WEIGHTS, 1)].cpu().clone()
    return Fingerprint(int(bits.sum(dtype=torch.int64)), sample, len(flat))


def check_pairs(pairs: Sequence[TokenizedPair], loss: Loss[Any]) -> None:
    """Refuse pairs from which nothing can be learned, or from which the loss would learn something else.

    Args:
        pairs: Pairs of the train split.
        loss: Loss of the method.

    Raises:
        UserError: No pair has both a weight and a preference, or the loss ignores one of them.
    """
    check_labels(pairs, loss)
    weightless = sum(pair.weight == 0 for pair in pairs)
    # The minimum of a loss with a reference is the reference itself, where training starts.
    labels = [pair.preference if pair.label is None else pair.label for pair in pairs if pair.weight != 0]
    undecided = labels.count(0.5) if loss.uses_reference else 0
    if weightless + undecided < len(pairs):
        return
    name = "preference" if pairs[0].label is None else "label"
    reasons = [f"the weight of {_all_or(weightless, pairs)} is 0"] if weightless else []
    reasons += [f"the {name} of {_all_or(undecided, pairs)} is 0.5"] if undecided else []
    raise UserError(
        f"nothing can be learned from the training pairs: {' and '.join(reasons)}; look at the columns of data.path"
    )


def _all_or(count: int, pairs: Sequence[TokenizedPair]) -> str:
    return f"all {count:,}" if count == len(pairs) else f"{count:,}"


def check_steps(steps: int, max_steps: int, stop: Stop) -> str | None:
    """Note that training stopped early, and refuse a run that stopped for no known reason or before its first step.

    Args:
        steps: Optimizer steps that were taken.
        max_steps: Optimizer steps that were asked for.
        stop: Callback that knows why training stopped.

    Returns:
        A sentence about an early stop, ``None`` if training took all of its steps.

    Raises:
        UserError: Nothing was trained, or nobody stopped the training.
    """
    if steps >= max_steps:
        return None
    words = f"training stopped after {steps:,} of {_steps(max_steps)}"
    if stop.reason is None:
        raise UserError(
            f"{words}, and no callback or limit of time stopped it: this run cannot be finished; "
            "remove the callbacks of your own, or report this as a fault of spo"
        )
    words += f": {stop.reason}"
    if steps == 0:
        raise UserError(f"{words}; nothing was trained, so raise trainer.max_time or change the callback")
    note("stopped_early", words, steps)
    return words


def note_unmoved(every: int | None, steps: int) -> None:
    """Note that a reference which follows the policy did not, so that the method was the one of a frozen reference.

    Args:
        every: Optimizer steps between two moves of the reference; ``None`` if it does not move.
        steps: Optimizer steps that were taken.
    """
    if every is not None and steps < every:
        note(
            "reference_never_moved",
            f"the reference did not move in {_steps(steps)}, as if it were frozen (reference.every={every})",
            steps,
        )


def check_weights(
    start: Start,
    weights: Mapping[str, Tensor],
    steps: int,
    cfg: DictConfig,
    history: Iterable[Mapping[str, Any]],
    skipped: int = 0,
) -> dict[str, float]:
    """Check that training changed the policy, and return how much of it.

    Args:
        start: Weights before training.
        weights: Weights after training, by name.
        steps: Optimizer steps that were taken or skipped.
        cfg: Configuration of the run, resolved.
        history: Rows of ``history.jsonl``.
        skipped: Optimizer steps that were skipped.

    Returns:
        ``trained/changed_share``, the share of trainable weights that differ from the start; empty without a step.

    Raises:
        UserError: The policy equals its base after more than zero steps.
    """
    if steps == 0:
        return {}
    share, rows = start.changed_share(weights), [row for row in history if "train/grad_norm" in row]
    dtype = next(iter(start.fingerprints.values())).sample.dtype
    # Weight decay changes weights even without a gradient.
    is_flat = bool(rows) and all(row["train/grad_norm"] == 0 for row in rows)
    if share == 0 or is_flat:
        what = "the policy equals its base" if share == 0 else "nothing but weight decay changed the policy"
        cause = _ALL_SKIPPED if skipped == steps else _likely_cause(cfg, dtype, rows)
        raise UserError(f"{what} after {_steps(steps)}: {cause}")
    if dtype in HALF_PRECISION and share < MIN_CHANGED_SHARE:
        note(
            "updates_rounded",
            f"{share:.1%} of the trained weights differ from the start: most updates were smaller than the spacing of "
            f"numbers in {_name(dtype)} and were lost; {_MASTER_WEIGHTS}",
            share,
        )
    return {f"{PREFIX}changed_share": share}


_ALL_SKIPPED = (
    "each of them was skipped, because its loss or gradient was not finite; set callbacks.nonfinite.action=stop"
)
_MASTER_WEIGHTS = "model.dtype=float32 trainer.precision=bf16-mixed computes in bfloat16 and keeps weights in float32"


def _likely_cause(cfg: DictConfig, dtype: torch.dtype, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the most likely reason why training changed no weight, with a remedy."""
    norms = [row["train/grad_norm"] for row in rows]
    if rows and not any(row.get("train/lr") for row in rows):
        return "the learning rate was 0 in every step; lower scheduler.num_warmup_steps, or raise trainer.max_steps"
    if rows and None in norms:
        return (
            "the gradient was infinite or undefined, and clipping turns such a gradient into 0; look at the weights "
            "of the pairs, which may overflow, and at model.dtype"
        )
    if rows and not any(norms):
        return (
            "the gradient was 0 in every step, so the loss is flat where training starts; look at alpha, beta, and "
            "the weights and preferences of the pairs"
        )
    rate = number(float(cfg.optimizer.lr)) if "lr" in cfg.optimizer else "that of the optimizer"
    remedy = f"; {_MASTER_WEIGHTS}" if dtype in HALF_PRECISION else "; raise optimizer.lr"
    return (
        f"updates at a learning rate of {rate} are smaller than the spacing of numbers in {_name(dtype)}, so they "
        f"round away{remedy}"
    )


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
