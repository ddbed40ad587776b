"""Best of several completions, by judges that score and judges that compare."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from spo.data.rows import Text
from spo.errors import JudgeError
from spo.evaluation.best_of import best_of, standing_of
from spo.evaluation.judges import JudgedPair, PairwiseJudge, RewardJudge

Answer = Callable[[JudgedPair], float | str]


class Comparing(PairwiseJudge):
    """A judge that answers by a function, and records what it was asked."""

    def __init__(self, folder: Path, answer: Answer, max_unanswered: float = 1.0) -> None:
        super().__init__(folder / "verdicts.sqlite", max_unanswered)
        self.answer, self.asked = answer, list[JudgedPair]()

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": "comparing"}

    def ask(self, comparisons: Sequence[JudgedPair]) -> Generator[Mapping[JudgedPair, float | str], None, None]:
        self.asked += comparisons
        yield {pair: self.answer(pair) for pair in comparisons}


def longer(pair: JudgedPair) -> float:
    return 0.5 + 0.5 * ((len(pair.first) > len(pair.second)) - (len(pair.first) < len(pair.second)))


def test_best_by_reward() -> None:
    seen: list[Any] = []

    def reward(prompts: Sequence[Any], completions: Sequence[str]) -> dict[str, list[float]]:
        seen.extend(prompts)
        return {"reward": [float(len(text)) for text in completions], "other": [0.0] * len(completions)}

    judge = RewardJudge(reward)
    messages: Text = ({"role": "user", "content": "q"},)
    assert best_of(judge, messages, ["a", "abc", "ab", "xyz"]) == 1  # the first of equals
    assert standing_of(judge, "q", ["a", "ab"]).values == [1.0, 2.0]
    assert seen == ["q"] * 6
    assert best_of(judge, "q", ["a"]) == 0


def test_best_by_wins_against_the_others_in_both_orders(tmp_path: Path) -> None:
    judge = Comparing(tmp_path, longer)
    texts = ["aa", "a", "aaa", "bb", "aa"]
    standing = standing_of(judge, "q", texts)
    # Each of four others: a tie is half a win, and equal texts are a tie without a question.
    assert (standing.measure, standing.values) == ("win_rate", [2 / 4, 0.0, 1.0, 2 / 4, 2 / 4])
    assert standing.best == best_of(judge, "q", texts) == 2
    asked = {(pair.first, pair.second) for pair in judge.asked}
    assert asked == {(b, a) for a, b in asked} and ("a", "aaa") in asked and ("aa", "aa") not in asked


def test_preference_for_a_place_decides_nothing(tmp_path: Path) -> None:
    first = Comparing(tmp_path, lambda pair: 1.0)
    assert standing_of(first, "q", ["a", "b", "c"]).values == [0.5] * 3
    assert best_of(first, "q", ["a", "b", "c"]) == 0


def test_questions_without_an_answer_are_left_out(tmp_path: Path) -> None:
    judge = Comparing(tmp_path, lambda pair: "silent" if "x" in pair.first + pair.second else longer(pair))
    standing = standing_of(judge, "q", ["a", "xxxxx", "aaa"])
    assert standing.values == [0.0, None, 1.0] and standing.best == 2
    with pytest.raises(JudgeError, match="did not answer a single question"):
        best_of(judge, "q", ["x", "xx"])


def test_one_and_no_completion(tmp_path: Path) -> None:
    judge = Comparing(tmp_path, longer)
    assert standing_of(judge, "q", ["a"]).values == [0.5] and best_of(judge, "q", ["a"]) == 0 and not judge.asked
    with pytest.raises(ValueError, match="no completion to choose from"):
        best_of(judge, "q", [])
