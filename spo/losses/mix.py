"""A weighted sum of losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo.losses.base import Loss
from spo.types import Logps

if TYPE_CHECKING:
    from spo.objective import ScoredBatch


class MixLoss(Loss[Any], nn.Module):
    r"""A weighted sum of losses that read the same kind of data.

    .. math:: L = \sum_k w_k L_k

    where L_k are the losses of the parts, ``(B,)``. The parts share alpha and beta, and each applies soft labels and
    weights itself; next to a part that compares completions, one that learns from the chosen completion alone does so
    too. Implicit rewards are those of the first part. Losses of a whole step (``full_batch``) cannot be parts.

    Args:
        losses: Losses by name.
        weights: Weight of each loss by its name.

    Raises:
        ValueError: There is no loss, a name differs, a weight is negative or infinite, all are zero, or losses do not
            fit together.
    """

    def __init__(self, losses: Mapping[str, Loss[Any]], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.losses, self.weights = dict(losses), dict(weights)
        if not self.losses:
            raise ValueError("losses is empty: name at least one")
        for name, loss in self.losses.items():
            if not isinstance(loss, Loss):
                raise ValueError(f"losses.{name} must be a loss with a _target_, got {loss!r}")
        for name in self.losses.keys() - self.weights.keys():
            raise ValueError(f"losses.{name} does not have a weight: set +method.loss.weights.{name}=NUMBER")
        for name in self.weights.keys() - self.losses.keys():
            raise ValueError(f"weights.{name} is the weight of no loss; losses has {', '.join(self.losses)}")
        if not all(isinstance(weight, int | float) for weight in self.weights.values()):
            raise ValueError(f"weights must be numbers, got {self.weights}")
        if not (all(0 <= weight < math.inf for weight in self.weights.values()) and any(self.weights.values())):
            raise ValueError(f"weights must be finite and at least 0, one of them above 0, got {self.weights}")
        self._check_parts()
        if any(loss.uses_rejected for loss in self.losses.values()):
            self.losses = {name: _comparing(loss) for name, loss in self.losses.items()}
        for name, loss in self.losses.items():
            if isinstance(loss, nn.Module):
                self.add_module(name, loss)
        parts = self.losses.values()
        self.inputs = next(iter(parts)).inputs
        self.uses_reference = any(loss.uses_reference for loss in parts)
        self.uses_rejected = any(loss.uses_rejected for loss in parts)
        self.uses_alpha = any(loss.uses_alpha for loss in parts)
        self.uses_beta = any(loss.uses_beta for loss in parts)
        self.terms = {
            f"{name}.{key}": term._replace(compute=partial(self._term, name, term.compute))
            for name, loss in self.losses.items()
            for key, term in loss.terms.items()
        }
        self.features = self._of_parts("features")
        self.extra_completions = self._of_parts("extra_completions")
        self.extra_references = tuple(dict.fromkeys(name for loss in parts for name in loss.extra_references))
        own = [metric for loss in parts for metric in loss.extra_metrics]
        self.extra_metrics = tuple(dict.fromkeys([*(f"mix/{name}" for name in self.losses), *own]))

    def _check_parts(self) -> None:
        """Raise if the losses cannot be parts of one sum."""
        kinds = {loss.inputs for loss in self.losses.values()}
        if len(kinds) > 1:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"the losses of a mix must read one kind of data, and these read {names}")
        for name, loss in self.losses.items():
            if loss.full_batch:
                raise ValueError(
                    f"losses.{name}: {type(loss).__name__} compares all pairs of a step, so it cannot be mixed"
                )
            if "." in name or "/" in name:
                raise ValueError(f"losses.{name}: a name must not have a dot or a slash")

    def _of_parts(self, declaration: str) -> dict[str, Any]:
        return {
            f"{name}.{key}": value
            for name, loss in self.losses.items()
            for key, value in getattr(loss, declaration).items()
        }

    def _term(self, name: str, compute: Callable[[ScoredBatch], Tensor], scored: ScoredBatch) -> Tensor:
        """Return a term of a part, which finds the further completions of its rows under its names."""
        if not self.losses[name].extra_completions:
            return compute(scored)  # without computing log-probs of tokens again
        return compute(replace(scored, batch=replace(scored.batch, extra=_own(name, scored.batch.extra))))

    @property
    def has_width(self) -> bool:
        """Return whether a part has parameters whose shape depends on the policy."""
        return any(loss.has_width for loss in self.losses.values())

    def fit_width(self, width: int) -> None:
        """Let each part make its parameters of that width."""
        for loss in self.losses.values():
            loss.fit_width(width)

    @property
    def has_statistics(self) -> bool:
        """Return whether a part updates statistics from all pairs of each optimizer step."""
        return any(loss.has_statistics for loss in self.losses.values())

    def update_statistics(self, logps: Logps) -> None:
        """Let each part update its statistics."""
        for name, loss in self.losses.items():
            loss.update_statistics(self._seen_by(name, logps))

    def _seen_by(self, name: str, logps: Logps) -> Logps:
        """Return the log-probs with the numbers that a part declares, under its names."""
        own = partial(_own, name)
        return replace(logps, terms=own(logps.terms), features=own(logps.features), extra=own(logps.extra))

    def _of(self, name: str, logps: Logps, alpha: float, beta: float) -> Tensor:
        return self.losses[name](self._seen_by(name, logps), alpha=alpha, beta=beta)

    def __call__(self, logps: Logps, /, *, alpha: float, beta: float) -> Tensor:
        """Compute the ``(B,)`` weighted sum of the losses of each row."""
        each = [self.weights[name] * self._of(name, logps, alpha, beta) for name in self.losses]
        return torch.stack(each).sum(0)

    def metrics(self, logps: Logps, /, *, alpha: float, beta: float) -> dict[str, Tensor]:
        """Compute the metrics of the first part, those of the others' own, and each loss."""
        found: dict[str, Tensor] = {}
        for name, loss in reversed(self.losses.items()):
            found |= loss.metrics(self._seen_by(name, logps), alpha=alpha, beta=beta)
        of = partial(self._of, logps=logps, alpha=alpha, beta=beta)
        return found | {f"mix/{name}": of(name).detach() for name in self.losses}


def _comparing(loss: Loss[Any]) -> Loss[Any]:
    """Return a loss that applies soft labels even if it learns from the chosen completion alone."""
    if not loss.uses_rejected:
        loss = copy(loss)
        loss.uses_rejected = True
    return loss


def _own(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a part, under its names."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
