"""Choices of which completions of one prompt become a pair, or a ranked list, of the next round."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import combinations
from random import Random
from typing import Annotated

from annotated_types import Ge

from spo.bounds import PositiveFloat


class Pairing(ABC):
    """Choice of pairs or lists among the completions of one prompt.

    Completions are known by their positions, so the same text twice is two completions. Equal scores never form a
    pair.

    Attributes:
        needs_scores: A judge has to score the completions.
        needs_rewards: The scores have to be rewards. A judge that only compares does not suffice.
        pairs_with_data: The chosen completion is the data's response, and the rejected one is the policy's own.
        yields_lists: The choices are ranked lists of any length, not pairs.
    """

    needs_scores: bool = True
    needs_rewards: bool = False
    pairs_with_data: bool = False
    yields_lists: bool = False

    @abstractmethod
    def choose(self, scores: Sequence[float], random: Random) -> list[tuple[int, ...]]:
        """Choose pairs or lists.

        Args:
            scores: ``(K,)`` score of each completion; a higher one is better.
            random: Source of random numbers; a pairing that does not draw leaves it unused.

        Returns:
            Positions of the completions of each pair or list, best first.
        """


class BestAndWorst(Pairing):
    """Pair the best completion with the worst one, as SPPO does (arXiv:2405.00675).

    Of several best or worst ones, the first is taken.
    """

    def choose(self, scores: Sequence[float], random: Random) -> list[tuple[int, ...]]:
        """Return one pair, or none if all scores are equal."""
        return _pairs(scores, [(_first(scores, max(scores)), _first(scores, min(scores)))]) if scores else []


class AllPairs(Pairing):
    """Pair every completion with every worse one."""

    def choose(self, scores: Sequence[float], random: Random) -> list[tuple[int, ...]]:
        """Return all pairs of unequal scores."""
        return _pairs(scores, list(combinations(range(len(scores)), 2)))


class Ranking(Pairing):
    """Rank the completions into one list; of several with the same score, only the first is in it."""

    yields_lists = True

    def choose(self, scores: Sequence[float], random: Random) -> list[tuple[int, ...]]:
        """Return one list, or none if all scores are equal."""
        levels = sorted(set(scores), reverse=True)
        return [tuple(_first(scores, level) for level in levels)] if len(levels) > 1 else []


class RejectionSampling(Pairing):
    """Select completions by statistical rejection sampling, and pair the accepted ones: RSO, arXiv:2309.06657.

    :func:`rejection_sample` selects. The first accepted completion is then paired with the second, the third with the
    fourth, and so on, each pair ordered by its rewards; a last one without a partner is left out. This pairing is a
    reconstruction of the paper's first round of a tournament, whose details were not available.

    Args:
        beta: Temperature of the sampling; a smaller one keeps more of the best completions.
        keep: Number of completions to accept.

    Raises:
        ValueError: ``beta`` is not positive and finite, or ``keep`` is below 2.
    """

    needs_rewards = True

    def __init__(self, beta: PositiveFloat = 0.5, keep: Annotated[int, Ge(2)] = 2) -> None:
        _check_beta(beta)
        if keep < 2:
            raise ValueError(f"keep must be 2 or more, as a pair needs two completions, got {keep}")
        self.beta = beta
        self.keep = keep

    def choose(self, scores: Sequence[float], random: Random) -> list[tuple[int, ...]]:
        """Return one pair for every two accepted completions, except for those with equal rewards."""
        accepted = rejection_sample(scores, self.beta, self.keep, random)
        return _pairs(scores, list(zip(accepted[::2], accepted[1::2], strict=False)))


class OwnAgainstData(Pairing):
    """Pair the data's response with the policy's own completion: SPIN, arXiv:2401.01335. No judge is asked."""

    needs_scores = False
    pairs_with_data = True

    def choose(self, scores: Sequence[float], random: Random) -> list[tuple[int, ...]]:
        """Raise an error, because this pairing does not choose among own completions.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("OwnAgainstData pairs each completion with the data's response and does not choose")


def rejection_sample(rewards: Sequence[float], beta: float, keep: int, random: Random) -> list[int]:
    r"""Select completions by statistical rejection sampling: algorithm 1 of RSO, arXiv:2309.06657.

    A pass visits the remaining completions in order, and accepts each with probability exp((r - m) / beta), where m is
    the highest reward that remained when the pass began. Accepted completions are removed before the next pass, which
    has an m of its own. Sampling ends as soon as ``keep`` are accepted, within a pass too, or when none remains. Every
    pass accepts its best completion, so the loop ends.

    For independent samples of a policy, the first accepted one is approximately distributed as

    .. math:: \pi_r(y|x) \propto \pi(y|x) \exp(r(x, y) / \beta)

    exactly so where m is known to be the highest reward of all responses. The order of the completions has to be one
    that does not depend on their rewards.

    Args:
        rewards: ``(K,)`` reward of each completion. Equal completions count separately.
        beta: Temperature, above 0. A large one keeps the first completions, and a small one the best.
        keep: Number of completions to accept. With fewer completions, all are accepted.
        random: Source of random numbers, one for each visit.

    Returns:
        Positions of the accepted completions, in order of acceptance.

    Raises:
        ValueError: ``beta`` is not positive and finite, ``keep`` is negative, or a reward is not finite.
    """
    _check_beta(beta)
    if keep < 0:
        raise ValueError(f"keep must be 0 or more, got {keep}")
    if not all(map(math.isfinite, rewards)):
        raise ValueError("rejection sampling needs a finite reward of every completion")
    accepted: list[int] = []
    remaining = list(range(len(rewards)))
    while remaining and len(accepted) < keep:
        highest = max(rewards[position] for position in remaining)
        rejected = []
        for position in remaining:
            if random.random() >= math.exp((rewards[position] - highest) / beta):
                rejected.append(position)
                continue
            accepted.append(position)
            if len(accepted) == keep:
                break
        remaining = rejected
    return accepted


def _check_beta(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")


def _first(scores: Sequence[float], score: float) -> int:
    return list(scores).index(score)


def _pairs(scores: Sequence[float], pairs: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Return pairs of unequal scores, the better completion of each first."""
    return [(a, b) if scores[a] > scores[b] else (b, a) for a, b in pairs if scores[a] != scores[b]]
