"""Regimes of the built-in data: labels, writers of the responses, narrow coverage, and prompts without pairs."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from statistics import fmean

import pytest

from spo.data.gold_columns import sigmoid
from spo.data.rows import SPLITS, Completion
from spo.data.stories import GoldReward, StoryWorld
from spo.data.stories import grammar as g
from spo.data.stories.reward import problem_of
from tests.test_stories import GOOD, PROMPT, gold, source, writer


@pytest.mark.parametrize(
    ("labels", "digest"),
    [
        ("soft", "a0ea1f28f9a644c3064218052e9735aecddb8ea71a44d218eef257e4872a4df5"),
        ("hard", "7f9f9b646c2702df531d1da3e1bdb68165e953ef66567cbac39df0a159edb219"),
    ],
)
def test_default_rows_are_those_of_earlier_versions(labels: str, digest: str) -> None:
    rows = source(labels=labels).rows(writer)
    values = [[row.prompt, row.chosen, row.rejected, row.preference, row.split, row.where] for row in rows]
    assert hashlib.sha256(json.dumps(values).encode()).hexdigest() == digest
    assert source(labels=labels).prompts("train") == StoryWorld(0).openings(30, "train")


# --- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_label_noise_flips_outcomes_and_mixes_probabilities(noise: float) -> None:
    many = {"num_prompts": 300, "pairs_per_prompt": 2}
    clean, noisy, soft = (
        source(labels=labels, label_noise=e, **many).rows(writer)
        for labels, e in (("hard", 0.0), ("hard", noise), ("soft", noise))
    )
    flipped = [(a.chosen, a.rejected) == (b.rejected, b.chosen) for a, b in zip(clean, noisy, strict=True)]
    assert all(flip or a == b for flip, a, b in zip(flipped, clean, noisy, strict=True))
    assert abs(sum(flipped) - noise * len(clean)) < 4 * math.sqrt(len(clean) * noise * (1 - noise))
    # The flips of a lower noise are among those of a higher one.
    more = source(labels="hard", label_noise=min(0.5, 2 * noise), **many).rows(writer)
    again = [(a.chosen, a.rejected) == (b.rejected, b.chosen) for a, b in zip(clean, more, strict=True)]
    assert all(later for flip, later in zip(flipped, again, strict=True) if flip)
    assert [(row.chosen, row.rejected) for row in soft] == [(row.chosen, row.rejected) for row in noisy]
    for row in soft:
        p = sigmoid(gold(row.chosen, row.prompt)["reward"] - gold(row.rejected or "", row.prompt)["reward"])
        assert row.preference == pytest.approx((1 - noise) * p + noise * (1 - p), abs=1e-12)


def test_deterministic_labels_choose_the_higher_reward_and_drop_ties() -> None:
    better, worse = GOOD, GOOD.replace("Mia pulled", "Tom pulled")
    tied = GOOD.replace("tall tree", "thorny tree")  # another adjective, and the same reward

    def group(prompts: list[str], n: int) -> list[list[Completion]]:
        return [[Completion(text, True) for text in (worse, better, better, tied)] for _ in prompts]

    settings = {"labels": "deterministic", "num_prompts": 400, "selection_prompts": 0}
    stories, noisy = source(**settings), source(**settings, label_noise=0.25)
    for one in (stories, noisy):
        one.world.openings = lambda n, *_: [PROMPT] * n  # type: ignore[method-assign]
    rows = stories.rows(group)  # type: ignore[arg-type]
    assert {(row.chosen, row.rejected, row.preference) for row in rows} == {(better, worse, None)}
    assert len(rows) == stories.dropped_pairs["tied"] == 409
    wrong = sum(row.chosen == worse for row in noisy.rows(group))  # type: ignore[arg-type]
    assert abs(wrong - 0.25 * 409) < 4 * math.sqrt(409 * 0.25 * 0.75)


# --- writers -------------------------------------------------------------------------------------------------------


def no_writer(prompts: list[str], n: int) -> list[list[Completion]]:
    raise AssertionError("a model was asked")


def test_grammar_writes_distinct_responses_of_the_corpus_for_each_prompt() -> None:
    settings = {"responses": "grammar", "pairs_per_prompt": 3, "num_prompts": 100}
    stories = source(**settings)
    rows = stories.rows(no_writer)  # type: ignore[arg-type]
    assert stories.writer is None and sum(stories.dropped_pairs.values()) == 0
    assert Counter(row.split for row in rows) == {"train": 300, "selection": 24, "test": 27}
    texts = [(row.prompt, text) for row in rows for text in row.completions]
    assert len(set(texts)) == len(texts) == 702
    assert all(text.startswith(" ") and text.endswith(".") for _, text in texts)
    # They have the flaws of the corpus, and are about their own prompts.
    written = [gold(text, prompt) for prompt, text in texts]
    rewards = GoldReward()(*zip(*StoryWorld(0).stories(700, "x"), strict=True))["reward"]
    assert fmean(one["reward"] for one in written) == pytest.approx(fmean(rewards), abs=0.25)
    assert 0.4 < fmean(one["coherence"] > 0.99 for one in written) < 0.9
    # A longer draw extends a shorter one, and other prompts do not change it.
    fewer = source(responses="grammar", pairs_per_prompt=1, num_prompts=20).rows(no_writer)  # type: ignore[arg-type]
    first = {row.where: set(row.completions) for row in rows}
    assert [set(row.completions) for row in fewer[:20]] == [first[f"stories:train:{3 * i}"] for i in range(20)]
    other = source(seed=1, **settings).rows(no_writer)  # type: ignore[arg-type]
    assert not {text for row in other for text in row.completions} & {text for _, text in texts[:40]}


# --- coverage ------------------------------------------------------------------------------------------------------


def test_heroes_narrow_the_training_prompts_alone() -> None:
    narrow, broad = source(heroes=["Mia", "Tom"], num_prompts=60), source(num_prompts=60)
    train = narrow.prompts("train")
    assert len(set(train)) == 60 and all("Mia" in prompt or "Tom" in prompt for prompt in train)
    assert 15 < sum("Mia" in prompt for prompt in train) < 45
    for split in SPLITS[1:]:
        assert narrow.prompts(split) == broad.prompts(split)
    assert len(set(source(heroes=["Zoe"], num_prompts=2000).prompts("train"))) == 2000


@pytest.mark.parametrize("responses", ["reference", "grammar"])
def test_problems_narrow_the_training_responses_alone(responses: str) -> None:
    settings = {"responses": responses, "num_prompts": 200, "pairs_per_prompt": 4}
    narrow, broad = source(problems=["lost"], **settings), source(**settings)
    rows, all_rows = narrow.rows(writer), broad.rows(writer)
    train = [row for row in rows if row.split == "train"]
    assert {problem_of(str(text)) for row in train for text in row.completions} == {"lost"}
    assert [row for row in rows if row.split != "train"] == [row for row in all_rows if row.split != "train"]
    # Of eight responses two are about the problem on average. The grammar writes as many as it takes.
    dropped = narrow.dropped_pairs["other_problem"]
    assert len(train) + dropped == 800
    assert dropped == 0 if responses == "grammar" else 80 < len(train) < 300
    both = source(problems=["lost", "stuck"], **settings).rows(writer)
    assert {problem_of(str(row.chosen)) for row in both if row.split == "train"} == {"lost", "stuck"}


def test_problem_of_every_story_is_the_first_that_is_told() -> None:
    marks = {"stuck": ("was stuck",), "stolen": ("crow",), "costly": ("coins",), "lost": ("was lost", "knew where")}
    for _, continuation in StoryWorld(4).stories(300, "test"):
        first = next(sentence for sentence in continuation.split(". ") if sentence.startswith("But "))
        found = problem_of(continuation)
        assert found is not None and any(mark in first for mark in marks[found])
    assert problem_of(" Mia smiled and danced home.") is problem_of("") is None


def test_unlabeled_prompts_are_broad_and_in_no_split() -> None:
    stories = source(num_unlabeled=300, num_prompts=400, heroes=["Mia"])
    further = stories.unlabeled_prompts()
    assert len(set(further)) == 300 and {g.split_of(opening) for opening in further} == {"train"}
    assert not set(further) & {prompt for split in SPLITS for prompt in stories.prompts(split)}
    assert all(any(name in opening for opening in further) for name in g.NAMES)
    # The narrow prompts are a small part of the world: without the exclusion, some broad ones would be among them.
    wide = source(num_unlabeled=3000, num_prompts=2000)
    assert not set(wide.unlabeled_prompts()) & set(wide.prompts("train"))
    assert source().unlabeled_prompts() == [] and len(source(num_unlabeled=9, limit=4).unlabeled_prompts()) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"heroes": ["Mia", "Bob"]},
            "heroes: there is no Bob; the heroes of the story world are Mia, Lily,",
        ),
        ({"heroes": []}, "data.source.heroes: name at least one"),
        ({"problems": ["war"]}, "there is no war; the problems of the story world are stuck, stolen, costly, lost"),
        ({"responses": "grammar", "temperature": 0.7}, "data.source.temperature=0.7: data.source.responses=grammar"),
        ({"num_prompts": 20000, "heroes": ["Mia"]}, "at most 11520 train prompts about Mia; name more"),
        ({"test_prompts": 20000}, "data.source.test_prompts=20000: the story world draws at most 17280 test prompts"),
        ({"num_unlabeled": 138240}, "data.source.num_unlabeled=138240: beside the training prompts"),
    ],
)
def test_impossible_regimes_are_explained(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        source(**changes)
