"""The comparison of the policy that was saved with the policy that was trained, before a run is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo.data import TokenizedPair
from spo.errors import UserError
from spo.forward.modes import eval_mode
from spo.forward.speed import Speed
from spo.notes import note
from spo.ops import completion_targets, token_logps
from spo.records import filenames
from spo.types import pad_sequences

COMPARED_PAIRS = 4
"""Pairs of the train split whose sequences are compared. They hold the tokens that training changed."""
MAX_GAP_NATS = 1e-3
"""Largest accepted difference of a token's log-prob under the trained and the saved policy, in float32 and float64."""
MAX_HALF_PRECISION_GAP_EPS = 16
"""Largest accepted mean difference in half precision, in units of its spacing at one: 0.125 nats in bfloat16.

Merging rounds each weight once, which moves log-probs by 2 to 5 units on average, and single tokens by far more.
Weights that were tied by mistake move them by 10 to 250 units.
"""


class TrainedPolicy:
    """The trained policy as the saved one has to be: its log-probs of a few sequences, or its gathered weights.

    Args:
        policy: Policy, in the state to save. It moves to the device for the forward passes.
        rows: Token ids of the sequences.
        speed: Settings for the head.
        device: Device on which the saved policy will run. Another one would round in another way.
        weights: State that :func:`whole_state_dict` gathered, which is compared instead of log-probs; or ``None``.
    """

    def __init__(
        self,
        policy: nn.Module,
        rows: Sequence[Sequence[int]],
        speed: Speed,
        device: torch.device,
        weights: Mapping[str, Any] | None = None,
    ) -> None:
        self.rows, self.speed, self.weights = [row for row in rows if len(row) > 1], speed, weights
        if weights is None:
            place = next(policy.parameters()).device
            self.eps = _eps(policy)
            self.logps = _logps(policy.to(device), self.rows, speed)
            policy.to(place)

    def gap(self, saved: nn.Module, folder: Path) -> float | None:
        """Return the largest difference of a token's log-prob in nats, ``None`` if weights were compared instead.

        Args:
            saved: Policy as loaded from ``folder``, on the device.
            folder: Folder that :func:`save_policy` wrote, for the message.

        Raises:
            UserError: The saved policy is another model than the trained one.
        """
        if self.weights is not None:
            loaded = saved.state_dict()
            wrong = [name for name, weight in self.weights.items() if not _same(weight, loaded.get(name))]
            if wrong:
                raise UserError(_not_the_trained_one(folder, f"{len(wrong)} weights differ, such as {wrong[0]}"))
            return None
        saved_logps, eps = _logps(saved, self.rows, self.speed), max(self.eps, _eps(saved))
        # A masked token has the log-prob -inf in both, where a difference would be NaN.
        gaps = torch.where(saved_logps == self.logps, 0.0, saved_logps - self.logps).abs()
        largest, mean = (float(gaps.max()), float(gaps.mean())) if len(gaps) else (0.0, 0.0)
        rounds = eps > torch.finfo(torch.float32).eps
        measured, limit = (mean, MAX_HALF_PRECISION_GAP_EPS * eps) if rounds else (largest, MAX_GAP_NATS)
        if not measured <= limit:  # The comparison is negated so that NaN fails it.
            kind = "on average" if rounds else "at most"
            words = f"log-probs of tokens differ by {measured:.3g} nats {kind}, where {limit:.3g} is rounding"
            raise UserError(_not_the_trained_one(folder, words))
        if rounds and largest > MAX_GAP_NATS:
            note(
                "saved_policy_rounded",
                f"the weights in {folder.name}/ are rounded to half precision: log-probs of tokens differ from those "
                f"in training by {mean:.2g} nats on average and {largest:.2g} at most; model.dtype=float32 avoids it",
            )
        return largest


def rows_to_compare(pairs: Sequence[TokenizedPair]) -> list[list[int]]:
    """Return the token ids of both sequences of a few pairs, spread evenly over them."""
    chosen = pairs[:: max(len(pairs) // COMPARED_PAIRS, 1)][:COMPARED_PAIRS]
    return [[*pair.prompt_ids, *completion] for pair in chosen for completion in pair.completions[:2]]


@torch.no_grad()
def _logps(policy: nn.Module, rows: Sequence[Sequence[int]], speed: Speed) -> Tensor:
    """Return the log-probs of all tokens but the first of each sequence, on the host, in nats.

    Each sequence is a forward pass of its own, without padding and packing, so that nothing but the weights matters.
    """
    device, alone = next(policy.parameters()).device, replace(speed, packing=False)
    found = []
    with eval_mode(policy):
        for row in rows:
            sequences = pad_sequences([(row[:1], row[1:])], pad_token_id=0).to(device)
            found.append(token_logps(alone.logits(policy, sequences), completion_targets(sequences)).cpu())
    return torch.cat(found) if found else torch.zeros(0)


def _eps(policy: nn.Module) -> float:
    """Return the spacing of numbers at one in the coarsest dtype of the weights."""
    return max(torch.finfo(p.dtype).eps for p in policy.parameters() if p.is_floating_point())


def _same(weight: Any, loaded: Any) -> bool:
    return isinstance(loaded, Tensor) and torch.equal(weight.to(loaded), loaded)


def _not_the_trained_one(folder: Path, difference: str) -> str:
    adapter = folder.parent / filenames.ADAPTER
    kept = adapter if adapter.is_dir() else folder.parent / filenames.CHECKPOINTS
    return (
        f"the policy saved in {folder} is not the one that was trained: {difference}; the trained weights are in "
        f"{kept}, so nothing is lost: look at model.lora and model.dtype, and at weights that the architecture shares"
    )
