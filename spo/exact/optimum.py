"""The policy that minimizes an objective: in closed form if the loss states one, else by Newton's method."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from spo.errors import UserError
from spo.exact.world import World
from spo.losses import Loss
from spo.models import Reference
from spo.objective import parameters_of
from spo.ops import kl
from spo.types import LabelledLogps

MAX_NEWTON_RESPONSES = 1000
"""Most responses, of all prompts together, for which second derivatives are computed."""
GRADIENT_TOLERANCE = 1e-9
"""Largest derivative of the objective, per nat of log-probability, that counts as a minimum."""
FLAT = 1e-9
"""Curvature, as a share of the largest one, below which an objective is flat and its least point is at infinity."""
SAME_POLICY = 1e-4
"""Largest total variation of two minima that count as one."""


@dataclass(frozen=True)
class Optimum:
    """The minimum of an objective.

    Attributes:
        logps: ``(P, R)`` float64 log-probabilities.
        found: Method that found them.
    """

    logps: Tensor
    found: Literal["closed form", "numerical"]


@dataclass(frozen=True)
class Objective:
    """The objective of a run as a function of the probabilities of all responses.

    Attributes:
        loss: Loss of the method.
        world: Language and rows. Their labels count as exact Bradley-Terry probabilities.
        reference: ``(P, R)`` float64 log pi_ref.
        alpha: Softness.
        beta: Temperature of the method.
        kl_weight: Coefficient of KL(policy || reference), a mean over prompts.
        uniform: Whether the rows stand for independent uniform draws from all responses, which closed forms assume.
    """

    loss: Loss[Any]
    world: World
    reference: Tensor
    alpha: float
    beta: float
    kl_weight: float
    uniform: bool

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the objective of the policy ``softmax(logits)``, from ``(P, R)`` logits."""
        policy = logits.log_softmax(-1)
        rows = self.world.rows(self.loss, policy, self.reference)
        losses = self.loss(rows, alpha=self.alpha, beta=self.beta)
        return losses.mean() + self.kl_weight * kl(policy, self.reference).mean()

    def closed_form(self) -> Tensor | None:
        """Return ``(P, R)`` log-probabilities as the loss states them, or ``None`` if the objective is another one."""
        if self.kl_weight > 0 or not self.uniform:
            return None
        known = {"lengths": self.world.lengths} if "lengths" in inspect.signature(self.loss.optimum).parameters else {}
        stated = self.loss.optimum(self.world.rewards, self.reference, self.alpha, self.beta, **known)
        if stated is None:
            return None
        stated = stated.double()
        if not (stated.logsumexp(-1).abs() < 1e-4).all():
            raise UserError(f"{type(self.loss).__name__}.optimum must return normalized log-probabilities")
        return stated.log_softmax(-1)

    def is_determined(self) -> bool:
        """Return whether the objective has a single minimum: rows or a KL compare any two responses to a prompt."""
        if self.kl_weight > 0:
            return True
        # Connected components: each response takes the least index of those that it is compared with.
        group = torch.arange(self.world.rewards.numel())
        while True:
            least = group[self.world.completions].amin(0).expand_as(self.world.completions)
            merged = group.scatter_reduce(0, self.world.completions.flatten(), least.flatten(), "amin")
            if torch.equal(merged, group):
                break
            group = merged
        return bool((group.view_as(self.world.rewards) == group.view_as(self.world.rewards)[:, :1]).all())


def beyond_enumeration(loss: Loss[Any], reference: Reference | type[Reference]) -> str | None:
    """Return why an objective does not follow from the log-probs of all responses, or ``None`` if it does."""
    # Numbers of a row are constants that the rows bring along, so they are no obstacle.
    declared = {
        "numbers of single tokens": loss.terms,
        "further completions": loss.extra_completions,
        "further references": loss.extra_references,
        "labels of single completions": loss.inputs is LabelledLogps,
        "running statistics": loss.has_statistics,
        "parameters of its own": parameters_of(loss),
        "a reference that moves": reference.moves,
    }
    read = [words for words, is_declared in declared.items() if is_declared]
    return f"it reads {' and '.join(read)}, not log-probs of responses alone" if read else None


def why_no_optimum(loss: Loss[Any], reference: Reference | type[Reference]) -> str | None:
    """Return why the optimum of an objective is unknown whatever the data, or ``None`` if it can be found."""
    return beyond_enumeration(loss, reference) or loss.no_optimum or None


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Return half the sum of absolute differences of probabilities over the last dimension, from log-probabilities."""
    return (p.exp() - q.exp()).abs().sum(-1) / 2


def find_optimum(objective: Objective) -> Optimum | None:
    """Find the minimum of an objective.

    Returns:
        The minimum, or ``None`` if there is no single one: the rows compare some responses with no other, or the
        objective does not have a minimum, or has several.
    """
    stated = objective.closed_form()
    if stated is not None:
        return Optimum(stated, "closed form")
    if objective.loss.no_optimum or not objective.is_determined():
        return None
    solved = minimize(objective, objective.reference, objective.beta)
    return None if solved is None else Optimum(solved, "numerical")


def minimize(objective: Callable[[Tensor], Tensor], start: Tensor, beta: float) -> Tensor | None:
    """Find the single policy at which an objective is least.

    The search runs from ``start`` and from the uniform policy. Two searches do not prove that a minimum is the only
    one, but they find several where a loss is far from convex.

    Args:
        objective: Function of ``(P, R)`` logits of the policy.
        start: ``(P, R)`` logits to start from.
        beta: Temperature of the method, by which the slope of its loss grows.

    Returns:
        ``(P, R)`` log-probabilities, or ``None`` if a search does not reach a minimum, or if the two differ.
    """
    first = _minimum(objective, start, beta)
    if first is None:
        return None
    second = _minimum(objective, torch.zeros_like(start), beta)
    if second is None or not (total_variation(first, second) < SAME_POLICY).all():
        return None
    return first


def _minimum(objective: Callable[[Tensor], Tensor], start: Tensor, beta: float) -> Tensor | None:
    """Return the ``(P, R)`` log-probs of a minimum by descent and Newton steps, or ``None`` if none is reached."""
    logits = _descend(objective, start.clone())
    small = logits.numel() <= MAX_NEWTON_RESPONSES
    if small:
        logits = _newton(objective, logits)
    gradient = torch.func.grad(objective)(logits)
    # The slope of a loss grows with its temperature, and so does what counts as zero.
    if not (gradient.isfinite().all() and gradient.abs().max() <= GRADIENT_TOLERANCE * max(1.0, beta)):
        return None
    # A loss that saturates has small slopes far away from any minimum, but it is flat there.
    if small and not _is_curved(_pinned_hessian(objective, logits)):
        return None
    return logits.log_softmax(-1)


def _pinned_hessian(objective: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Return second derivatives, with a term that pins the sum of each prompt's logits.

    A constant added to all logits of a prompt changes nothing, so the Hessian is singular without this term.
    """
    prompt = torch.arange(logits.shape[0]).repeat_interleave(logits.shape[1])
    pin = (prompt[:, None] == prompt[None, :]).double()
    return torch.func.hessian(objective)(logits).reshape(logits.numel(), logits.numel()) + pin


def _is_curved(hessian: Tensor) -> bool:
    """Return whether an objective rises in every direction from a point where its slope is zero."""
    curvatures = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
    return bool(curvatures[0] > FLAT * curvatures[-1])


def _descend(objective: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    logits = logits.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=2000,
        tolerance_grad=GRADIENT_TOLERANCE / 10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def value() -> Tensor:
        optimizer.zero_grad()
        result = objective(logits)
        result.backward()
        return result

    optimizer.step(value)
    return logits.detach()


def _newton(objective: Callable[[Tensor], Tensor], logits: Tensor, steps: int = 500) -> Tensor:
    """Run Newton's method on the gradient, halving each step until the gradient shrinks.

    A loss that holds weights constant in its gradient is the gradient of no function, so there is nothing to descend,
    but there is a root to find.
    """
    gradient_at = torch.func.grad(objective)
    gradient = gradient_at(logits)
    for _ in range(steps):
        size_before = gradient.abs().max()
        if not gradient.isfinite().all() or size_before < GRADIENT_TOLERANCE / 100:
            break
        hessian = _pinned_hessian(objective, logits)
        step = torch.linalg.lstsq(hessian, gradient.flatten()).solution.view_as(logits)
        for halvings in range(20):
            trial = logits - step * 0.5**halvings
            gradient = gradient_at(trial)
            if gradient.abs().max() < size_before:
                logits = trial
                break
        else:
            break
    return logits
