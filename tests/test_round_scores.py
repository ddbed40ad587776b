"""Scores and win rates of own completions, from judges with rewards and from those that only compare."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import pytest

from spo.errors import UserError
from spo.evaluation.judges import Judge, JudgedPair, RewardJudge
from spo.notes import collect_notes
from spo.rounds.scoring import score_completions, win_rates_of_rewards
from tests.test_judges import Fake


class Comparing:
    """A judge that only compares, by the answers that it is given; it remembers what it was asked."""

    def __init__(self, answers: dict[tuple[str, str], float | None]) -> None:
        self.answers = answers
        self.asked: list[JudgedPair] = []

    def scores(self, prompts: Sequence[Any], completions: Sequence[str]) -> None:
        return None

    def verdicts(self, comparisons: Sequence[JudgedPair]) -> list[float | None]:
        self.asked += comparisons
        return [self._answer(one.first, one.second) for one in comparisons]

    def _answer(self, first: str, second: str) -> float | None:
        if (first, second) in self.answers:
            return self.answers[first, second]
        other = self.answers[second, first]
        return None if other is None else 1 - other


def lengths(prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
    return {"reward": [float(len(one)) for one in completions], "shortness": [-float(len(one)) for one in completions]}


def test_rewards_become_scores_and_mean_sigmoids() -> None:
    groups = [["aaa", "b", "", "aaa"], ["c"], []]
    found = score_completions(RewardJudge(lengths), ["p", "q", "r"], groups)
    assert [one.scores for one in found] == [[3, 1, 0, 3], [1], []]
    values = np.array([3, 1, 0, 3.0])
    expected = (1 / (1 + np.exp(values[None] - values[:, None]))).mean(1)
    assert found[0].win_rates == pytest.approx(expected, abs=1e-15)
    assert found[0].win_rates[0] == found[0].win_rates[3]
    assert found[1].win_rates == [0.5] and found[2].win_rates == []
    assert all(one.are_rewards for one in found)
    assert sum(found[0].win_rates) == pytest.approx(4 / 2)  # one wins what another loses
    by_component = score_completions(RewardJudge(lengths), ["p"], groups[:1], "shortness")[0]
    assert by_component.scores == [-3, -1, 0, -3]
    assert by_component.win_rates == pytest.approx(1 - expected)
    assert score_completions(RewardJudge(lengths), [], []) == []


def test_far_apart_rewards_do_not_overflow() -> None:
    assert win_rates_of_rewards([-1e308, 1e308]) == [0.25, 0.75]


def test_comparing_judge_is_asked_about_all_different_pairs_once() -> None:
    answers: dict[tuple[str, str], float | None] = {("a", "b"): 1.0, ("b", "c"): 0.75, ("c", "a"): 1.0, ("x", "y"): 0.1}
    judge = Comparing(answers)
    prompts: list[Any] = ["p", ({"role": "user", "content": "q"},), "r"]
    groups = [["a", "b", "c", "a"], ["y", "x"], ["z", "z"]]
    found = score_completions(cast(Judge, judge), prompts, groups)
    assert judge.asked == [
        JudgedPair("p", "a", "b"),
        JudgedPair("p", "a", "c"),
        JudgedPair("p", "b", "c"),
        JudgedPair("q", "y", "x"),
    ]
    # a beats b and loses to c, is itself, and is once more there: (1/2 + 1 + 0 + 1/2) / 4
    assert found[0].win_rates == pytest.approx([2 / 4, (0.5 + 0.75) / 4, (2 + 0.25 + 0.5) / 4, 2 / 4])
    assert found[0].win_rates[0] == found[0].win_rates[3]
    assert found[1].win_rates == pytest.approx([0.7, 0.3]) and found[2].win_rates == [0.5, 0.5]
    assert all(one.scores == one.win_rates and not one.are_rewards for one in found)


def test_equal_verdicts_give_equal_scores_in_any_order() -> None:
    """Plain sums in other orders may differ in the last digit, and completions that tie would form a pair."""
    random = Random(0)
    rates = (0.1, 0.2, 0.4)
    answers: dict[tuple[str, str], float | None] = {pair: random.random() for pair in itertools.combinations("cde", 2)}
    answers |= {("a", "b"): 0.5} | dict(zip(itertools.product("a", "cde"), rates, strict=True))
    answers |= dict(zip(itertools.product("b", "cde"), rates[::-1], strict=True))
    for seed in range(20):
        group = list("abcdeac")
        Random(seed).shuffle(group)
        found = score_completions(cast(Judge, Comparing(answers)), ["p"], [group])[0].win_rates
        assert all(found[group.index(text)] == rate for text, rate in zip(group, found, strict=True))
        assert sum(found) == pytest.approx(len(group) / 2)
    first, second, *_ = score_completions(cast(Judge, Comparing(answers)), ["p"], ["abcde"])[0].win_rates
    assert first == second and sum((0.5, 0.5, *rates)) / 5 != sum((0.5, 0.5, *rates[::-1])) / 5


def test_unanswered_comparisons_are_ties_and_one_note(caplog: pytest.LogCaptureFixture) -> None:
    answers: dict[tuple[str, str], float | None] = {("a", "b"): None, ("b", "c"): 1.0, ("a", "c"): None}
    with collect_notes() as notes:
        found = score_completions(cast(Judge, Comparing(answers)), ["p", "q"], [["a", "b", "c"], ["b", "c"]])
    assert found[0].win_rates == pytest.approx([0.5, 2 / 3, 1 / 3])
    assert notes == {"notes/unanswered_comparisons": 2}
    assert caplog.messages == ["the judge did not answer 2 of 4 comparisons of completions; each counts as a tie"]


def test_cached_verdicts_are_not_asked_again(tmp_path: Path) -> None:
    def longer(shown: JudgedPair) -> float:
        return float(len(shown.first) > len(shown.second))

    judge = Fake(tmp_path, longer)
    first = score_completions(judge, ["p"], [["aa", "a", "aaa"]])
    assert len(judge.asked) == 6 and first[0].win_rates == pytest.approx([1.5 / 3, 0.5 / 3, 2.5 / 3])
    assert score_completions(judge, ["p"], [["aaa", "aa", "a"]])[0].win_rates == pytest.approx(
        [2.5 / 3, 1.5 / 3, 0.5 / 3]
    )
    assert len(judge.asked) == 6


def test_unknown_reward_is_named_with_those_there_are() -> None:
    words = r"iteration\.source\.reward=length: the judge does not give a .* choose one of reward, shortness"
    with pytest.raises(UserError, match=words):
        score_completions(RewardJudge(lengths), ["p"], [["a"]], "length")
    with pytest.raises(UserError, match=r"iteration\.source\.reward=length: the judge only compares completions"):
        score_completions(cast(Judge, Comparing({})), ["p"], [["a"]], "length")
