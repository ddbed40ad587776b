"""Closed forms of methods, written token by token from the papers, without the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

POLICY, REFERENCE, EXTRA = "policy", "reference", "extra"


@dataclass(frozen=True)
class Completion:
    """A completion as each model sees it.

    Attributes:
        tokens: ``(T,)`` token ids.
        of_models: ``(T, V)`` log-probs of the next token at each position, by the name of the model.
        number: A number of the completion.
    """

    tokens: Tensor
    of_models: Mapping[str, Tensor]
    number: float = 0.0

    def each(self, model: str) -> Tensor:
        """Return ``(T,)`` log-probs of the tokens."""
        return torch.stack([row[token] for row, token in zip(self.of_models[model], self.tokens, strict=True)])

    def logp(self, model: str) -> Tensor:
        return self.each(model).sum()

    @property
    def ratio(self) -> Tensor:
        return self.logp(POLICY) - self.logp(REFERENCE)


def completion(
    prompt: Sequence[int], tokens: Sequence[int], models: Mapping[str, nn.Module], number: float = 0.0
) -> Completion:
    """Run each model on one sequence, without padding."""
    ids = torch.tensor([[*prompt, *tokens]])
    seen = {name: model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for name, model in models.items()}
    seen = {name: logps if name == POLICY else logps.detach() for name, logps in seen.items()}
    return Completion(torch.tensor(tokens), seen, number)


@dataclass(frozen=True)
class Row:
    """A pair, or a labelled completion.

    Attributes:
        chosen: Chosen or only completion.
        rejected: Rejected completion.
        mismatched: Completion of another prompt.
        embedding: Embedding of the prompt.
        right: Probability that the label is right, or that the only completion is desirable.
        weight: Weight of the row.
    """

    chosen: Completion
    rejected: Completion | None = None
    mismatched: Completion | None = None
    embedding: Sequence[float] = ()
    right: float = 1.0
    weight: float = 1.0


Pairs = list[tuple[Completion, Completion]]


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


class Oracle:
    """The loss of a step. Subclasses write the loss of each pair with certain labels."""

    moves = False

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.parameters: dict[str, Tensor] = {}

    def of_pairs(self, pairs: Pairs, rows: list[Row]) -> list[Tensor]:
        raise NotImplementedError

    def observe(self, rows: list[Row]) -> None:
        """See the rows of a step before its loss."""

    def losses(self, rows: list[Row]) -> list[Tensor]:
        """Return the loss of each row: the expectation over its label, times its weight."""
        # Rows whose label is certain have it in both calls.
        right = self.of_pairs([_in_order(row, row.right > 0) for row in rows], rows)
        wrong = self.of_pairs([_in_order(row, row.right == 1) for row in rows], rows)
        return [
            row.weight * (row.right * a + (1 - row.right) * b) for row, a, b in zip(rows, right, wrong, strict=True)
        ]

    def move(self, reference: nn.Module, policy: nn.Module, step: int) -> None:
        """Move the reference after a step."""


def _in_order(row: Row, is_right: bool) -> tuple[Completion, Completion]:
    return (row.chosen, row.rejected) if is_right else (row.rejected, row.chosen)  # type: ignore[return-value]


def each_pair(of_pair: Callable[[Completion, Completion, float], Tensor]) -> type[Oracle]:
    """Return the oracle of a loss in which pairs do not depend on each other."""

    class EachPair(Oracle):
        def of_pairs(self, pairs: Pairs, rows: list[Row]) -> list[Tensor]:
            return [of_pair(better, worse, self.beta) for better, worse in pairs]

    return EachPair


def dpo(better: Completion, worse: Completion, beta: float) -> Tensor:
    return -log_sigmoid(beta * (better.ratio - worse.ratio))


def tdpo2(better: Completion, worse: Completion, beta: float) -> Tensor:
    def divergence(y: Completion) -> Tensor:
        return sum(
            ((q.exp() * (q - p)).sum() for p, q in zip(y.of_models[POLICY], y.of_models[REFERENCE], strict=True)),
            torch.zeros(()),
        )

    shift = 0.5 * (divergence(worse) - divergence(better).detach())
    return -log_sigmoid(beta * (better.ratio - worse.ratio - shift))


def wpo(better: Completion, worse: Completion, beta: float) -> Tensor:
    weight = 1.0
    for y in (better, worse):
        agreement = [
            float(logp) - float(torch.log((row.exp() ** 2).sum()))
            for logp, row in zip(y.each(POLICY).detach(), y.of_models[POLICY].detach(), strict=True)
        ]
        weight *= float(torch.tensor(sum(agreement) / len(agreement), dtype=torch.float64).exp())
    return weight * dpo(better, worse, beta)


def ld_dpo(better: Completion, worse: Completion, beta: float) -> Tensor:
    shorter = min(len(better.tokens), len(worse.tokens))

    def reward(y: Completion) -> Tensor:
        ratio = y.each(POLICY) - y.each(REFERENCE)
        return ratio[:shorter].sum() + 0.5 * ratio[shorter:].sum()

    return -log_sigmoid(beta * (reward(better) - reward(worse)))


def hinge(better: Completion, worse: Completion, beta: float) -> Tensor:
    return torch.relu(1 - beta * (better.ratio - worse.ratio))


def mrpo(better: Completion, worse: Completion, beta: float) -> Tensor:
    (extra_better, base_better), (extra_worse, base_worse) = (
        (y.logp(EXTRA), y.logp(REFERENCE)) for y in (better, worse)
    )
    gap_extra, gap_base = abs(extra_better - extra_worse), abs(base_better - base_worse)
    share = gap_extra / (gap_extra + gap_base + 1e-6)
    size_better, size_worse = abs(extra_better + base_better) / 2, abs(extra_worse + base_worse) / 2
    clip_better = 0.1 * size_better / (size_better + size_worse)

    def combined(extra: Tensor, base: Tensor, clip: Tensor) -> Tensor:
        extra = torch.minimum(torch.maximum(extra, (1 + clip) * base), (1 - clip) * base)
        return -torch.log(share / extra.exp() + (1 - share) / base.exp())

    better_margin = better.logp(POLICY) - combined(extra_better, base_better, clip_better)
    worse_margin = worse.logp(POLICY) - combined(extra_worse, base_worse, 0.1 - clip_better)
    return -log_sigmoid(beta * (better_margin - worse_margin))


class RPO(Oracle):
    def of_pairs(self, pairs: Pairs, rows: list[Row]) -> list[Tensor]:
        e = torch.tensor([row.embedding for row in rows], dtype=torch.float32).double()
        losses = []
        for i, (better, _) in enumerate(pairs):
            cosine = [float(e[i] @ other / (e[i].norm() * other.norm())) for other in e]
            weight = torch.softmax(torch.tensor([-(1 - c) / 0.5 for c in cosine], dtype=torch.float64), 0)
            each = [
                -log_sigmoid(self.beta * w * (better.ratio - worse.ratio))
                for w, (_, worse) in zip(weight, pairs, strict=True)
            ]
            losses.append(torch.stack(each).mean())
        return losses


class ExactRPO(RPO):
    """RPO with independent soft labels: the expectation over all outcomes of all labels."""

    def losses(self, rows: list[Row]) -> list[Tensor]:
        total = torch.zeros(len(rows), dtype=torch.float64)
        for outcome in itertools.product((True, False), repeat=len(rows)):
            shares = [row.right if is_right else 1 - row.right for row, is_right in zip(rows, outcome, strict=True)]
            if (share := math.prod(shares)) > 0:
                pairs = [_in_order(row, is_right) for row, is_right in zip(rows, outcome, strict=True)]
                total = total + share * torch.stack(self.of_pairs(pairs, rows))
        return [row.weight * loss for row, loss in zip(rows, total, strict=True)]


class AOT(Oracle):
    def losses(self, rows: list[Row]) -> list[Tensor]:
        pairs = [_in_order(row, row.right >= 0.5) for row in rows]
        policy = [better.logp(POLICY) - worse.logp(POLICY) for better, worse in pairs]
        reference = sorted(better.logp(REFERENCE) - worse.logp(REFERENCE) for better, worse in pairs)
        losses = {}
        for k, i in enumerate(sorted(range(len(rows)), key=lambda i: float(policy[i]))):
            logit, right = self.beta * (policy[i] - reference[k]), max(rows[i].right, 1 - rows[i].right)
            losses[i] = -right * log_sigmoid(logit) - (1 - right) * log_sigmoid(-logit)
        return [row.weight * losses[i] for i, row in enumerate(rows)]


class BCO(Oracle):
    def __init__(self, beta: float) -> None:
        super().__init__(beta)
        self.rewards: list[float] = []

    def observe(self, rows: list[Row]) -> None:
        self.rewards += [self.beta * float(row.chosen.ratio) for row in rows]

    def losses(self, rows: list[Row]) -> list[Tensor]:
        shift = sum(self.rewards) / len(self.rewards)
        losses = []
        for row in rows:
            logit = self.beta * row.chosen.ratio - shift
            losses.append(row.weight * -(row.right * log_sigmoid(logit) + (1 - row.right) * log_sigmoid(-logit)))
        return losses


class KTO(Oracle):
    def losses(self, rows: list[Row]) -> list[Tensor]:
        ratios = [row.mismatched.ratio.detach() for row in rows if row.mismatched is not None]
        kl = max(0.0, float(sum(ratios)) / len(ratios))
        losses = []
        for row in rows:
            desirable = 1 - torch.sigmoid(self.beta * (row.chosen.ratio - kl))
            undesirable = 1 - torch.sigmoid(self.beta * (kl - row.chosen.ratio))
            losses.append(row.weight * (row.right * desirable + (1 - row.right) * undesirable))
        return losses


class Debiased(Oracle):
    def __init__(self, beta: float) -> None:
        super().__init__(beta)
        self.parameters = {"head.weight": torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)}

    def of_pairs(self, pairs: Pairs, rows: list[Row]) -> list[Tensor]:
        [weight] = self.parameters["head.weight"].flatten()
        return [
            -log_sigmoid(self.beta * (better.ratio - worse.ratio) + weight * (better.number - worse.number))
            for better, worse in pairs
        ]


class TRDPO(each_pair(dpo)):  # type: ignore[misc]
    moves = True

    def move(self, reference: nn.Module, policy: nn.Module, step: int) -> None:
        if step % 2 == 0:
            with torch.no_grad():
                for own, new in zip(reference.parameters(), policy.parameters(), strict=True):
                    own.copy_(0.4 * own + 0.6 * new)


ORACLES: dict[str, Callable[[float], Any]] = {
    "aot": AOT,
    "bco": BCO,
    "debiased": Debiased,
    "hinge": each_pair(hinge),
    "kto": KTO,
    "ld_dpo": each_pair(ld_dpo),
    "mrpo": each_pair(mrpo),
    "outside_rpo": RPO,
    "rpo": ExactRPO,
    "tdpo2": each_pair(tdpo2),
    "tr_dpo": TRDPO,
    "wpo": each_pair(wpo),
}
"""Closed forms by method; a method in ``tests/outside`` has that of the shipped one unless it is listed itself."""
