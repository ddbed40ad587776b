"""The pairs of a round: which prompts, whose completions, which labels and columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from spo.data import Completion, DataError, Row, Source
from spo.data.rows import PromptRequest, Split, Writer
from spo.errors import UserError
from spo.evaluation.judges import JudgedPair
from spo.losses import DataNeeds, DPOLoss, SPORankedLoss, SPPOLoss
from spo.rounds import AllPairs, BestAndWorst, OwnAgainstData, Pairing, Ranking, RejectionSampling, RoundSource


class Given(Source):
    """Rows as they are."""

    def __init__(self, rows: Sequence[Row], supervised: Sequence[Row] | None = None) -> None:
        super().__init__()
        self.given, self.supervised = list(rows), supervised

    def rows(self, complete: Any) -> list[Row]:
        return self.given

    def sft_rows(self) -> list[Row] | None:
        return None if self.supervised is None else list(self.supervised)


class ByLength:
    """Judge whose reward is the length of a completion."""

    @property
    def identity(self) -> dict[str, Any]:
        return {}

    def scores(self, prompts: Sequence[Any], completions: Sequence[str]) -> dict[str, list[float]] | None:
        lengths = [float(len(text)) for text in completions]
        return {"reward": lengths, "half": [length / 2 for length in lengths]}

    def verdicts(self, comparisons: Sequence[JudgedPair]) -> list[float | None]:
        return [
            0.5 + 0.5 * ((len(one.first) > len(one.second)) - (len(one.first) < len(one.second))) for one in comparisons
        ]

    def usage(self) -> dict[str, float]:
        return {}


class OnlyCompares(ByLength):
    def scores(self, prompts: Sequence[Any], completions: Sequence[str]) -> None:
        return None


def rows(split: Split = "train", number: int = 3, prompt: Any = None) -> list[Row]:
    return [
        Row(prompt=prompt or f"{split} {i}", chosen=f"good {i}", rejected=f"bad {i}", split=split, where=f"{split}:{i}")
        for i in range(number)
    ]


ALL = [*rows(), *rows("selection", 2), *rows("test", 2)]
TEXTS = ["a", "bb", "bb", "dddd"]


def complete(prompts: Sequence[str | PromptRequest], n: int, /, writer: Writer | None = None) -> list[list[Completion]]:
    name = "" if writer is None or writer.model is None else writer.model
    return [[Completion(f"{name}{TEXTS[i % len(TEXTS)]}", True) for i in range(n)] for _ in prompts]


def source(inner: Source | None = None, pairing: Pairing | None = None, loss: Any = None, **given: Any) -> RoundSource:
    settings = {
        "completions": 4, "temperature": 1.0, "top_p": 1.0, "prompts": None, "labels": "soft", "reward": "reward",
        "reward_scale": 1.0, "history": 1, "seed": 0, "splits": {"selection": 0.1, "test": 0.1}, "split_seed": 0,
        "limit": None, "round": 1, "policies": [], "first": None, "earlier_coefficients": [],
    }  # fmt: skip
    made = RoundSource(inner or Given(ALL), pairing or BestAndWorst(), **{**settings, **given})
    made.needs = DataNeeds.of(loss or DPOLoss())
    made.judge = ByLength()
    return made


def own(found: Sequence[Row]) -> list[Row]:
    return sorted((row for row in found if row.split == "train"), key=lambda row: str(row.prompt))


def test_best_and_worst_with_soft_labels() -> None:
    found = source().rows(complete)
    assert [(row.prompt, row.chosen, row.rejected) for row in own(found)] == [
        (f"train {i}", "dddd", "a") for i in range(3)
    ]
    # The label is the Bradley-Terry probability of the rewards 4 and 1.
    assert all(row.preference == pytest.approx(1 / (1 + math.exp(-3))) for row in own(found))
    assert found[3:] == ALL[3:], "the other splits keep the pairs of the data"


def test_an_evaluation_on_other_data_completes_no_training_prompt() -> None:
    def refuse(prompts: Any, n: int, /, writer: Any = None) -> Any:
        raise AssertionError

    found = source(prompts=0, inner=Given([*rows(number=100), *ALL[3:]]))
    assert not found.needs_judge and source().needs_judge
    read = found.rows(refuse)
    assert read == [*rows(number=100)[:32], *ALL[3:]]
    scored = source(prompts=0, loss=SPPOLoss(win_rates=True))
    assert scored.needs_judge
    test = [row.columns for row in source(loss=SPPOLoss(win_rates=True)).rows(complete) if row.split == "test"]
    assert [row.columns for row in scored.rows(refuse) if row.split == "test"] == test


def test_certain_labels_and_the_scale_of_the_reward() -> None:
    assert all(row.preference is None for row in own(source(labels="certain").rows(complete)))
    scaled = own(source(reward_scale=0.5, reward="half").rows(complete))
    assert scaled[0].preference == pytest.approx(1 / (1 + math.exp(-0.75)))


def test_a_judge_that_only_compares_gives_certain_labels() -> None:
    made = source()
    made.judge = OnlyCompares()
    assert [(row.chosen, row.preference) for row in own(made.rows(complete))] == [("dddd", None)] * 3


def test_all_pairs_skip_ties_and_count_nothing_twice() -> None:
    found = own(source(pairing=AllPairs()).rows(complete))
    assert [(row.chosen, row.rejected) for row in found[:5]] == [
        ("bb", "a"), ("bb", "a"), ("dddd", "a"), ("dddd", "bb"), ("dddd", "bb")
    ]  # fmt: skip


def test_rankings_have_the_numbers_of_each_completion() -> None:
    made = source(pairing=Ranking(), loss=SPORankedLoss())
    assert made.yields_lists
    assert [row.completions for row in own(made.rows(complete))] == [("dddd", "bb", "a")] * 3


def test_win_rates_are_columns_of_every_split() -> None:
    found = source(loss=SPPOLoss(win_rates=True)).rows(complete)
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    best = (0.5 + s(3) + 2 * s(2)) / 4
    assert own(found)[0].columns["chosen_win_rate"] == pytest.approx(best)
    # Of the data's pair, "good 0" and "bad 0", each meets the other and itself.
    assert found[-1].columns["chosen_win_rate"] == pytest.approx((0.5 + s(1)) / 2)
    assert found[-1].columns["rejected_win_rate"] == pytest.approx((0.5 + s(-1)) / 2)


def test_unfinished_identical_and_tied_completions_are_counted() -> None:
    def cut(prompts: Any, n: int, /, writer: Any = None) -> list[list[Completion]]:
        return [
            [Completion("a", False), Completion("bb", False)],
            [Completion("a", True), Completion("bb", False)],
            [Completion("aa", True), Completion("bb", True)],
        ]

    made = source(completions=2)
    assert own(made.rows(cut)) == []
    assert made.dropped_pairs == {"unfinished": 2, "tied": 1}


def test_pairs_that_the_data_dropped_have_reasons_of_their_own() -> None:
    inner = Given(ALL)
    inner.dropped_pairs = Counter(unfinished=7)
    made = source(inner, completions=2)
    made.rows(lambda prompts, n, writer=None: [[Completion("a", True)] * n for _ in prompts])
    assert made.dropped_pairs == {"unfinished in the data": 7, "tied": 3, "unfinished": 0}


def test_the_prompts_of_a_round_are_a_new_subset() -> None:
    inner = Given([*rows(number=40), *rows("test", 2)])
    chosen = [
        [row.prompt for row in own(source(inner, prompts=8, round=number).rows(complete))] for number in (1, 2, 1)
    ]
    assert len(set(chosen[0])) == 8 and chosen[0] == chosen[2] != chosen[1]


def test_data_without_splits_is_split_as_a_run_splits_it() -> None:
    from spo.data.splits import split_rows

    plain = [Row(f"prompt {i}", f"good {i}", f"bad {i}") for i in range(60)]
    found = source(Given(plain)).rows(complete)
    placed = split_rows(plain, 0, 0.1, 0.1)
    assert {row.prompt for row in own(found)} == {row.prompt for row in placed if row.split == "train"}
    assert {row.prompt for row in found if row.split == "test"} == {row.prompt for row in placed if row.split == "test"}
    assert 0 < len([row for row in placed if row.split == "test"]) < 15


def test_other_seeds_of_a_round_keep_the_splits_and_limits_of_the_data() -> None:
    plain = [Row(f"prompt {i}", f"good {i}", f"bad {i}") for i in range(60)]
    one, other = (source(Given(plain), seed=seed, limit=30).rows(complete) for seed in (0, 1))
    prompts = [{row.prompt: row.split for row in found} for found in (one, other)]
    assert prompts[0] == prompts[1] and len(prompts[0]) == 30


def test_conversations_are_completed_by_an_assistant() -> None:
    prompt = ({"role": "user", "content": "Hello"},)
    data = [
        Row(prompt, ({"role": "assistant", "content": "x"},), ({"role": "assistant", "content": "y"},), split="train")
    ]
    asked: list[Any] = []

    def note(prompts: Any, n: int, /, writer: Any = None) -> list[list[Completion]]:
        asked.extend(prompts)
        return complete(prompts, n, writer)

    [row] = own(source(Given(data)).rows(note))
    assert row.chosen == ({"role": "assistant", "content": "dddd"},) and row.prompt == prompt
    assert asked == [PromptRequest(prompt)]


# --- self-play against the data ---


def test_own_completions_lose_against_the_data_without_a_judge() -> None:
    made = source(pairing=OwnAgainstData(), completions=2)
    made.judge = None
    assert not made.needs_judge
    found = own(made.rows(complete))
    expected = [(f"good {i}", text) for i in range(3) for text in ("a", "bb")]
    assert [(row.chosen, row.rejected) for row in found] == expected


def numbered(prompts: Sequence[str | PromptRequest], n: int, /, writer: Writer | None = None) -> list[list[Completion]]:
    """Complete a prompt with numbers. The third completion does not end."""
    return [[Completion(f"{i}", i != 2) for i in range(n)] for _ in prompts]


def test_every_response_of_a_prompt_is_paired_with_samples_of_its_own() -> None:
    several = [Row("three", text, "-", split="train") for text in ("x", "y", "x", "z", "y", "3")]
    made = source(Given([*ALL, *several]), OwnAgainstData(), completions=1)
    found = own(made.rows(numbered))
    # Of the responses x, y, z and 3, z has the sample that does not end, and 3 has one that repeats it.
    expected = [("three", "x", "0"), ("three", "y", "1"), *((f"train {i}", f"good {i}", "0") for i in range(3))]
    assert [(row.prompt, row.chosen, row.rejected) for row in found] == expected
    assert made.dropped_pairs == {"unfinished": 1, "identical": 1}
    found = own(source(Given(several[:2]), OwnAgainstData(), completions=2).rows(numbered))
    assert [(row.chosen, row.rejected) for row in found] == [("x", "0"), ("x", "1"), ("y", "3")]


def test_conversations_may_have_several_responses() -> None:
    def turn(text: str) -> Any:
        return ({"role": "assistant", "content": text},)

    prompt = ({"role": "user", "content": "Hello"},)
    data = [Row(prompt, turn(text), turn("-"), split="train") for text in ("x", "y", "x")]
    found = source(Given(data), OwnAgainstData(), completions=1).rows(complete)
    assert [(row.chosen, row.rejected) for row in found] == [(turn("x"), turn("a")), (turn("y"), turn("bb"))]


def test_supervised_rows_are_the_data_of_self_play() -> None:
    inner = Given(ALL, supervised=[Row("story", "a person's", split="train")])
    [row] = own(source(inner, OwnAgainstData(), completions=1).rows(complete))
    assert (row.prompt, row.chosen, row.rejected) == ("story", "a person's", "a")


def test_history_draws_each_completion_from_one_of_the_newest_policies() -> None:
    inner = Given([*rows(number=200), *rows("test", 2)])
    made = source(inner, OwnAgainstData(), completions=1, history=2, policies=["0:", "1:", "2:"], round=3)
    assert [writer.model for writer in made.writers] == ["1:", "2:"]
    names = [row.rejected[:2] for row in own(made.rows(complete))]  # type: ignore[index]
    # Binomial with 200 draws: beyond five standard deviations in fewer than one of a million seeds.
    assert set(names) == {"1:", "2:"} and abs(names.count("1:") - 100) < 36


def test_writers_have_numbers_of_their_own() -> None:
    first, later = source(policies=["p"]), source(policies=["p"], round=2)
    assert first.writers[0] != later.writers[0], "the same policy writes new completions in another round"


# --- errors in words ---


def test_what_cannot_be_completed_is_refused() -> None:
    with pytest.raises(ValueError, match="a pair needs at least 2 completions"):
        source(completions=1)
    with pytest.raises(ValueError, match="choose soft or certain"):
        source(labels="hard")
    lists = Given([])
    lists.yields_lists = True
    with pytest.raises(ValueError, match="choose data of pairs"):
        source(lists)
    with pytest.raises(DataError, match="does not have a training prompt"):
        source(Given(rows("test"))).rows(complete)


def test_a_missing_judge_and_one_without_rewards_are_errors_in_words() -> None:
    made = source()
    made.judge = None
    with pytest.raises(UserError, match="choose judge=MEMBER"):
        made.rows(complete)
    made = source(pairing=RejectionSampling(0.5, 2))
    made.judge = OnlyCompares()
    with pytest.raises(UserError, match="needs a judge that gives rewards"):
        made.rows(complete)
