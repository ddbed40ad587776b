"""Choices among own completions: all pairings, and rejection sampling by exact enumeration and in its limits."""

from __future__ import annotations

import inspect
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pytest

import spo.rounds
from spo.rounds import (
    AllPairs,
    BestAndWorst,
    OwnAgainstData,
    Pairing,
    Ranking,
    RejectionSampling,
    rejection_sample,
)

Distribution = dict[tuple[int, ...], float]
BETA = 0.7
# Every ratio of exp(reward / BETA) is a power of two, so four equal slices of [0, 1) tell all outcomes of a visit.
SLICES = (0.125, 0.375, 0.625, 0.875)
WORLD_REWARDS = [BETA * math.log(height) for height in (0.25, 1.0, 0.5)]
WORLD_POLICY = [0.5, 0.2, 0.3]
WORLD_BEST = 1


class Exhausted(Exception):
    """The script of random numbers has ended."""


class Scripted(Random):
    """Random numbers of a script."""

    def __init__(self, numbers: Sequence[float]) -> None:
        super().__init__(0)
        self.numbers = list(numbers)[::-1]

    def random(self) -> float:
        if not self.numbers:
            raise Exhausted
        return self.numbers.pop()


def enumerated(rewards: Sequence[float], keep: int, beta: float = BETA) -> Distribution:
    """Return the distribution of what is accepted, from a run of each script of slices."""
    found: Distribution = defaultdict(float)

    def follow(script: tuple[float, ...], probability: float) -> None:
        try:
            accepted = rejection_sample(rewards, beta, keep, Scripted(script))
        except Exhausted:
            assert len(script) < len(rewards) * (len(rewards) + 1) / 2, "every pass accepts one completion"
            for number in SLICES:
                follow((*script, number), probability / len(SLICES))
        else:
            found[tuple(accepted)] += probability

    follow((), 1.0)
    return found


def written_out(rewards: Sequence[float], keep: int, beta: float = BETA) -> Distribution:
    """Return the distribution of what is accepted, from the probabilities of all outcomes of each pass."""
    found: Distribution = defaultdict(float)

    def one_pass(accepted: tuple[int, ...], left: tuple[int, ...], probability: float) -> None:
        if not left or len(accepted) >= keep:
            found[accepted[:keep]] += probability
            return
        heights = [math.exp(rewards[i] / beta) for i in left]
        rates = [height / max(heights) for height in heights]
        for outcome in itertools.product([True, False], repeat=len(left)):
            rate = math.prod(p if yes else 1 - p for p, yes in zip(rates, outcome, strict=True))
            if rate > 1e-12:
                taken = tuple(i for i, yes in zip(left, outcome, strict=True) if yes)
                rest = tuple(i for i, yes in zip(left, outcome, strict=True) if not yes)
                one_pass((*accepted, *taken), rest, probability * rate)

    one_pass((), tuple(range(len(rewards))), 1.0)
    return found


def target(rewards: Sequence[float], policy: Sequence[float], beta: float = BETA) -> list[float]:
    """Return the policy times exp(r / beta), normalized."""
    heights = [p * math.exp(r / beta) for p, r in zip(policy, rewards, strict=True)]
    return [height / sum(heights) for height in heights]


def worlds(number: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Yield every sequence of independent responses, with its probability under the policy."""
    for responses in itertools.product(range(len(WORLD_POLICY)), repeat=number):
        yield responses, math.prod(WORLD_POLICY[response] for response in responses)


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the total variation."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2


def rewards_of(responses: Sequence[int]) -> list[float]:
    return [WORLD_REWARDS[response] for response in responses]


def first_accepted(number: int, *further: int) -> list[float]:
    """Return the distribution of the first accepted response of independent candidates and some given ones."""
    found = [0.0] * len(WORLD_POLICY)
    for responses, probability in worlds(number):
        candidates = (*responses, *further)
        for accepted, rate in enumerated(rewards_of(candidates), 1).items():
            found[candidates[accepted[0]]] += probability * rate
    return found


def first_accepted_in_closed_form(number: int, rewards: Sequence[float], policy: Sequence[float]) -> list[float]:
    """Sum over the highest reward among the candidates, and over the visit that accepts."""
    found = [0.0] * len(policy)
    for highest in sorted(set(rewards)):
        rates = [math.exp((r - highest) / BETA) if r <= highest else 0.0 for r in rewards]
        up_to = sum(p for p, r in zip(policy, rewards, strict=True) if r <= highest)
        below = sum(p for p, r in zip(policy, rewards, strict=True) if r < highest)
        rejects = up_to - sum(p * rate for p, rate in zip(policy, rates, strict=True))
        for y, (p, r) in enumerate(zip(policy, rewards, strict=True)):
            if r <= highest:
                # The later candidates are at most the highest, and if y is not it, they are not all below it.
                for later in range(number):
                    not_all_below = up_to**later - (r < highest) * below**later
                    found[y] += p * rates[y] * rejects ** (number - 1 - later) * not_all_below
    return found


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("heights", [(1.0, 0.5, 0.25), (0.25, 1.0, 0.5), (0.5, 1.0, 1.0), (0.25, 0.25, 0.25)])
def test_accepted_completions_follow_the_written_out_distribution(heights: tuple[float, ...], keep: int) -> None:
    """Over all random numbers, every sequence of accepted completions has its exact probability."""
    rewards = [BETA * math.log(height) - 3 for height in heights]
    found, expected = enumerated(rewards, keep), written_out(rewards, keep)
    assert found.keys() == expected.keys()
    assert all(found[one] == pytest.approx(expected[one], abs=1e-12) for one in expected)
    assert all(len(set(one)) == len(one) == min(keep, len(heights)) for one in found)


def first_pass(rewards: Sequence[float], numbers: Sequence[float]) -> list[int]:
    """Return what is accepted before more random numbers than completions are drawn."""
    for keep in range(len(rewards), 0, -1):
        try:
            return rejection_sample(rewards, BETA, keep, Scripted(numbers))
        except Exhausted:
            continue
    raise AssertionError("a pass accepts at least one completion")


def test_a_pass_accepts_in_proportion_to_exp_reward() -> None:
    """Each completion is accepted independently at the rate exp((r - m) / beta)."""
    responses = (0, 1, 2, 0, 2)
    rewards = rewards_of(responses)
    rates = [math.exp((r - max(rewards)) / BETA) for r in rewards]
    passes = [first_pass(rewards, numbers) for numbers in itertools.product(SLICES, repeat=len(rewards))]
    for size in (1, 2, 3):
        for some in itertools.combinations(range(len(rewards)), size):
            share = sum(set(some) <= set(accepted) for accepted in passes) / len(passes)
            assert share == pytest.approx(math.prod(rates[i] for i in some))
    assert sum(map(len, passes)) / len(passes) == pytest.approx(sum(rates))  # the acceptance rate, times K
    # In expectation, the accepted responses are in proportion to their share of the candidates times exp(r / beta).
    accepted = [responses[i] for one in passes for i in one]
    counts = [accepted.count(response) / len(accepted) for response in range(3)]
    assert counts == pytest.approx(target(WORLD_REWARDS, [responses.count(y) / len(responses) for y in range(3)]))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_first_accepted_has_the_target_distribution_where_the_highest_reward_is_known(number: int) -> None:
    """A last candidate of the highest reward fixes m, and what is accepted before it is exactly pi exp(r / beta)."""
    exact = target(WORLD_REWARDS, WORLD_POLICY)
    highest = max(WORLD_REWARDS)
    rate = sum(p * math.exp((r - highest) / BETA) for p, r in zip(WORLD_POLICY, WORLD_REWARDS, strict=True))
    none = (1 - rate) ** number
    expected = [(1 - none) * p + none * (response == WORLD_BEST) for response, p in enumerate(exact)]
    assert first_accepted(number, WORLD_BEST) == pytest.approx(expected, abs=1e-12)


def test_accepted_completions_are_independent_where_the_highest_reward_is_known() -> None:
    """The first two of a pass are two independent draws from pi exp(r / beta)."""
    number, exact = 3, target(WORLD_REWARDS, WORLD_POLICY)
    joint: Distribution = defaultdict(float)
    for responses, probability in worlds(number):
        for accepted, rate in enumerated(rewards_of((*responses, WORLD_BEST)), 2).items():
            if number not in accepted:
                joint[responses[accepted[0]], responses[accepted[1]]] += probability * rate
    total = sum(joint.values())
    assert len(joint) == 9 and 0.1 < total < 0.9
    assert all(joint[a, b] / total == pytest.approx(exact[a] * exact[b]) for a, b in joint)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_first_accepted_of_independent_candidates_has_its_closed_form(number: int) -> None:
    expected = first_accepted_in_closed_form(number, WORLD_REWARDS, WORLD_POLICY)
    assert sum(expected) == pytest.approx(1)
    assert first_accepted(number) == pytest.approx(expected, abs=1e-12)


def test_distribution_approaches_the_target_with_the_number_of_candidates() -> None:
    """One candidate is a sample of the policy. Many are as good as a known highest reward."""
    exact = target(WORLD_REWARDS, WORLD_POLICY)
    distances = [
        distance(first_accepted_in_closed_form(number, WORLD_REWARDS, WORLD_POLICY), exact)
        for number in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert distances[0] == pytest.approx(distance(WORLD_POLICY, exact))
    assert all(later < earlier for earlier, later in itertools.pairwise(distances))
    assert distances[0] > 0.2 and distances[2] > 0.02 and distances[-1] < 1e-6


def test_drawn_samples_have_the_closed_form() -> None:
    """The generator of Python gives what the four slices gave."""
    number, draws, random = 6, 20_000, Random(1)
    counts = [0] * len(WORLD_POLICY)
    for _ in range(draws):
        responses = random.choices(range(3), WORLD_POLICY, k=number)
        counts[responses[rejection_sample(rewards_of(responses), BETA, 1, random)[0]]] += 1
    expected = first_accepted_in_closed_form(number, WORLD_REWARDS, WORLD_POLICY)
    chi_square = sum((c - draws * p) ** 2 / (draws * p) for c, p in zip(counts, expected, strict=True))
    assert chi_square < 14  # the 99.9 % quantile with two degrees of freedom


def test_large_beta_keeps_the_first_and_small_beta_the_best() -> None:
    random = Random(0)
    rewards = [random.gauss(0, 1) for _ in range(64)]
    by_reward = sorted(range(64), key=lambda i: -rewards[i])
    for seed in range(5):
        assert rejection_sample(rewards, 1e12, 8, Random(seed)) == list(range(8))
        assert rejection_sample(rewards, 1e-12, 8, Random(seed)) == by_reward[:8]
    # The difference of two rewards and its quotient may be infinite, and a rate may round to 0.
    assert rejection_sample([-1.7e308, 1.7e308], 1e-300, 2, Random(0)) == [1, 0]


@pytest.mark.parametrize(("number", "keep", "mean"), [(16, 8, 0.69), (16, 2, 1.28), (64, 8, 1.34), (256, 8, 1.70)])
def test_kept_share_limits_how_far_selection_reaches(number: int, keep: int, mean: float) -> None:
    """Samples are not put back. Under pi exp(r / beta), normally distributed rewards have the mean 1 / beta = 2."""
    random, kept = Random(0), []
    for _ in range(400):
        rewards = [random.gauss(0, 1) for _ in range(number)]
        kept += [rewards[i] for i in rejection_sample(rewards, 0.5, keep, random)]
    assert sum(kept) / len(kept) == pytest.approx(mean, abs=0.06)


def test_single_best_is_accepted_in_the_first_pass() -> None:
    for position in range(4):
        rewards = [-0.1] * 4
        rewards[position] = 0.5
        for numbers in itertools.product((0.0, 1 - 2**-53), repeat=4):
            assert position in first_pass(rewards, numbers)


@pytest.mark.parametrize("reward", [-5.0, 0.0, 3.0])
def test_equal_rewards_are_accepted_in_order(reward: float) -> None:
    assert rejection_sample([reward] * 6, 0.5, 4, Random(0)) == [0, 1, 2, 3]
    assert RejectionSampling(keep=4).choose([reward] * 6, Random(0)) == []


def test_fewer_completions_than_wanted_are_all_accepted_once() -> None:
    rewards = [0.0, 5.0, 5.0, -5.0, 0.0]  # equal completions are told apart by their positions
    accepted = rejection_sample(rewards, 0.1, 8, Random(0))
    assert sorted(accepted) == [0, 1, 2, 3, 4] and accepted[:2] == [1, 2] and accepted[-1] == 3
    assert rejection_sample([], 0.5, 8, Random(0)) == rejection_sample(rewards, 0.5, 0, Random(0)) == []


def test_adding_a_constant_to_all_rewards_changes_nothing() -> None:
    rewards = [0.5, -1.0, 2.0, 0.25, 1.5, -0.75]
    for seed in range(20):
        moved = [reward + 1024 for reward in rewards]
        assert rejection_sample(rewards, 0.5, 4, Random(seed)) == rejection_sample(moved, 0.5, 4, Random(seed))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rejection_sample([1.0], 0.0, 1, Random(0)), "beta must be positive and finite, got 0.0"),
        (lambda: rejection_sample([1.0], math.nan, 1, Random(0)), "beta must be positive and finite, got nan"),
        (lambda: rejection_sample([1.0], 1.0, -1, Random(0)), "keep must be 0 or more, got -1"),
        (lambda: rejection_sample([1.0, math.nan], 1.0, 1, Random(0)), "needs a finite reward of every completion"),
        (lambda: RejectionSampling(beta=-1.0), "beta must be positive and finite, got -1.0"),
        (lambda: RejectionSampling(keep=1), "keep must be 2 or more, as a pair needs two completions, got 1"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("pairing", "scores", "expected"),
    [
        (BestAndWorst(), [0.5, 2.0, -1.0, 1.0], [(1, 2)]),
        (BestAndWorst(), [1.0, 0.0, 1.0, 0.0], [(0, 1)]),
        (BestAndWorst(), [0.3, 0.3, 0.3], []),
        (BestAndWorst(), [], []),
        (AllPairs(), [1.0, 3.0, 1.0], [(1, 0), (1, 2)]),
        (AllPairs(), [1.0, 2.0, 3.0], [(1, 0), (2, 0), (2, 1)]),
        (AllPairs(), [2.0], []),
        (Ranking(), [1.0, 3.0, 1.0, 2.0], [(1, 3, 0)]),
        (Ranking(), [1.0, 1.0], []),
        (Ranking(), [], []),
        (RejectionSampling(beta=1e12, keep=5), [1.0, 2.0, 4.0, 3.0, 9.0, 8.0], [(1, 0), (2, 3)]),
        (RejectionSampling(beta=1e-12, keep=4), [1.0, 2.0, 4.0, 3.0, 9.0, 8.0], [(4, 5), (2, 3)]),
    ],
)
def test_pairing_of_scores(pairing: Pairing, scores: list[float], expected: list[tuple[int, ...]]) -> None:
    before = list(scores)
    assert pairing.choose(scores, Random(0)) == expected and scores == before


@pytest.mark.parametrize("pairing", [BestAndWorst(), AllPairs(), Ranking(), RejectionSampling(beta=0.3, keep=6)])
def test_choices_are_ordered_and_use_the_random_numbers_given(pairing: Pairing) -> None:
    random = Random(3)
    for seed in range(30):
        scores = [float(random.randint(0, 4)) for _ in range(7)]
        chosen = pairing.choose(scores, Random(seed))
        assert chosen == pairing.choose(scores, Random(seed))
        assert all(scores[a] > scores[b] for one in chosen for a, b in itertools.pairwise(one))
        assert all(len(one) == 2 for one in chosen) or pairing.yields_lists


def test_what_pairings_need() -> None:
    """The declarations are read before anything is sampled or judged."""
    members = [getattr(spo.rounds, name) for name in spo.rounds.__all__]
    classes = [one for one in members if inspect.isclass(one) and issubclass(one, Pairing) and one is not Pairing]
    pairings = {one.__name__: one() for one in classes}
    assert len(pairings) == 5

    def with_attribute(name: str) -> set[str]:
        return {key for key, pairing in pairings.items() if getattr(pairing, name)}

    assert with_attribute("needs_scores") == pairings.keys() - {"OwnAgainstData"}
    assert with_attribute("needs_rewards") == {"RejectionSampling"}
    assert with_attribute("pairs_with_data") == {"OwnAgainstData"}
    assert with_attribute("yields_lists") == {"Ranking"}
    with pytest.raises(NotImplementedError, match="with the data's response"):
        OwnAgainstData().choose([1.0, 2.0], Random(0))
