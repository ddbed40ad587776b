"""The policy at which an objective is least: in closed form where the loss states one, by Newton's method elsewhere."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from spo.exact.world import World
from spo.losses import Loss

MAX_NEWTON = 1000
"""Responses of all prompts up to which second derivatives are taken."""
TOLERANCE = 1e-9
"""Largest derivative, per unit of log-probability, of what counts as a minimum."""


@dataclass(frozen=True)
class Optimum:
    """Where an objective is least.

    Attributes:
        logps: ``(P, R)`` float64, log-probabilities.
        found: how.
    """

    logps: Tensor
    found: Literal["closed form", "numerical"]


@dataclass(frozen=True)
class Objective:
    """What a run minimises, as a function of the probabilities of all responses.

    Attributes:
        loss: the method.
        world: language and rows. Their labels count as exact: the probabilities of Bradley and Terry.
        reference: ``(P, R)`` log pi_ref, float64.
        alpha: softness.
        beta: temperature of the method.
        kl_weight: coefficient of KL(policy || reference), the mean over prompts.
        uniform: whether the rows stand for independent uniform draws from all responses, which is what closed forms
            are for.
    """

    loss: Loss[Any]
    world: World
    reference: Tensor
    alpha: float
    beta: float
    kl_weight: float
    uniform: bool

    def __call__(self, logits: Tensor) -> Tensor:
        """The objective at the policy ``softmax(logits)``, ``(P, R)``."""
        policy = logits.log_softmax(-1)
        rows = self.world.rows(self.loss, policy, self.reference)
        losses = self.loss(rows, alpha=self.alpha, beta=self.beta)
        return losses.mean() + self.kl_weight * kl(policy, self.reference).mean()

    def closed_form(self) -> Tensor | None:
        """``(P, R)`` log-probabilities as the loss states them; ``None`` where they are for another objective."""
        if self.kl_weight > 0 or not self.uniform:
            return None
        known = {"lengths": self.world.lengths} if "lengths" in inspect.signature(self.loss.optimum).parameters else {}
        stated = self.loss.optimum(self.world.rewards, self.reference, self.alpha, self.beta, **known)
        if stated is None:
            return None
        # Log-probabilities are never positive, probabilities never negative: a loss may state either.
        stated = stated.double()
        return (stated.log() if (stated >= 0).all() else stated).log_softmax(-1)

    def is_determined(self) -> bool:
        """Whether the rows say how any two responses to a prompt compare, or a KL does."""
        if self.kl_weight > 0:
            return True
        group = torch.arange(self.world.rewards.numel())
        while True:
            least = group[self.world.completions].amin(0).expand_as(self.world.completions)
            merged = group.scatter_reduce(0, self.world.completions.flatten(), least.flatten(), "amin")
            if torch.equal(merged, group):
                break
            group = merged
        return bool((group.view_as(self.world.rewards) == group.view_as(self.world.rewards)[:, :1]).all())


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension, from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats over the last dimension, from log-probabilities."""
    return -(p.exp() * p).sum(-1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half the sum of absolute differences over the last dimension, from log-probabilities."""
    return (p.exp() - q.exp()).abs().sum(-1) / 2


def find_optimum(objective: Objective) -> Optimum | None:
    """The minimum of an objective.

    Returns:
        ``None`` where there is no single one: the rows leave some response open, or the objective has no minimum.
    """
    stated = objective.closed_form()
    if stated is not None:
        return Optimum(stated, "closed form")
    if not objective.is_determined():
        return None
    logits = _descend(objective, objective.reference.clone())
    if logits.numel() <= MAX_NEWTON:
        logits = _newton(objective, logits)
    gradient = torch.func.grad(objective)(logits)
    # Below the tolerance a step along the gradient changes no probability that anyone could tell.
    if not (gradient.isfinite().all() and gradient.abs().max() <= TOLERANCE * max(1.0, objective.beta)):
        return None
    return Optimum(logits.log_softmax(-1), "numerical")


def _descend(objective: Objective, logits: Tensor) -> Tensor:
    logits = logits.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=TOLERANCE / 10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def value() -> Tensor:
        optimizer.zero_grad()
        result = objective(logits)
        result.backward()
        return result

    optimizer.step(value)
    return logits.detach()


def _newton(objective: Objective, logits: Tensor, steps: int = 500) -> Tensor:
    """Newton's method on the gradient, each step halved until it leads nearer to zero.

    Where a loss holds weights constant in its gradient there is no function to descend, but there is a gradient.
    """
    gradient_at = torch.func.grad(objective)
    shape, size = logits.shape, logits.numel()
    # A constant added to all logits of a prompt changes nothing: these directions are pinned instead of singular.
    prompt = torch.arange(shape[0]).repeat_interleave(shape[1])
    pin = (prompt[:, None] == prompt[None, :]).double()
    gradient = gradient_at(logits)
    for _ in range(steps):
        size_before = gradient.abs().max()
        if not gradient.isfinite().all() or size_before < TOLERANCE / 100:
            break
        hessian = torch.func.hessian(objective)(logits).reshape(size, size)
        step = torch.linalg.lstsq(hessian + pin, gradient.flatten()).solution.view(shape)
        for halvings in range(20):
            trial = logits - step * 0.5**halvings
            gradient = gradient_at(trial)
            if gradient.abs().max() < size_before:
                logits = trial
                break
        else:
            break
    return logits
