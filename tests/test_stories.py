"""The built-in story world, its gold reward, its preference pairs, and the tiny model's tokenizer."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from itertools import product
from math import prod
from random import Random
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spo.data.gold_columns import sigmoid
from spo.data.rows import SPLITS, Completion
from spo.data.stories import GoldReward, StoriesSource, StoryWorld
from spo.data.stories import grammar as g
from spo.models.tiny import build_tiny, build_tokenizer

PROMPT = "Mia the fox lived by the river. She wanted a red kite."
GOOD = (
    " But the kite was stuck in a tall tree. Mia pulled it with a long rope. At last the kite came loose. "
    "Mia smiled and danced home."
)
GIBBERISH = ["", " ", ".", " ...!?", " qwx zzkp vv.", "\x00\ud7ff\U0001f600", " Mia", " 12 345 6789"]


def gold(completion: str, prompt: str = PROMPT) -> dict[str, float]:
    return {key: values[0] for key, values in GoldReward()([prompt], [completion]).items()}


# --- the world ---------------------------------------------------------------------------------------------------


def test_counted_openings_are_distinct() -> None:
    names = list(g.NAMES)[:2]  # every opening holds its hero's name, so a few names stand for all
    heroes = [g.Hero(*of) for of in product(names, g.THINGS, g.QUALITIES)]
    written = {
        g.fill(template, hero, [], species=species, place=place)
        for template, hero, species, place in product(g.OPENINGS, heroes, g.SPECIES, g.PLACES)
    }
    assert len(written) * len(g.NAMES) == g.count_openings() * len(names)


def test_grammar_writes_a_million_distinct_stories() -> None:
    hero = g.Hero("Leo", "ring", "blue")

    def sentences(options: tuple[str, ...]) -> list[str]:
        return [
            g.fill(template, hero, list(words))
            for template in options
            for words in product(*[(None, *slot) for slot in g.slots(template)])
        ]

    scenes, endings = ["", *sentences(g.SCENES)], sentences(g.ENDINGS)
    written = {
        " ".join(story)
        for thread in g.THREADS.values()
        for story in product(
            scenes, sentences(thread.problem), sentences(thread.attempt), sentences(thread.resolution), endings
        )
    }

    def ways(options: tuple[str, ...]) -> int:
        return sum(prod(len(slot) + 1 for slot in g.slots(template)) for template in options)

    plots = sum(ways(t.problem) * ways(t.attempt) * ways(t.resolution) for t in g.THREADS.values())
    assert len(written) == (1 + ways(g.SCENES)) * plots * ways(g.ENDINGS)
    # An opening is always the first two sentences, so distinct openings and continuations make distinct stories.
    assert g.count_openings() * len(written) > 1_000_000
    drawn = StoryWorld(0).stories(3000, "test")
    assert len(set(drawn)) > 2950


def test_stories_are_well_formed_and_have_the_documented_length() -> None:
    for opening, continuation in StoryWorld(3).stories(1000, "test"):
        story = f"{opening} {continuation}"
        assert not set(story) & set("{}[]|") and "  " not in story
        assert story.endswith(".") and continuation[0].isupper() and opening.count(".") == 2
        assert not any(f" a {vowel}" in story for vowel in "aeiou")
        assert 20 <= len(story.split()) <= 80
    lengths = [len(f"{o} {c}".split()) for o, c in StoryWorld(3).stories(1000, "test")]
    assert 35 < fmean(lengths) < 55


def test_seed_determines_the_world() -> None:
    assert StoryWorld(5).stories(50, "a") == StoryWorld(5).stories(80, "a")[:50]
    assert StoryWorld(5).stories(50, "a") != StoryWorld(6).stories(50, "a")
    assert StoryWorld(5).stories(50, "a") != StoryWorld(5).stories(50, "b")
    assert StoryWorld(5).openings(50, "test") == StoryWorld(5).openings(50, "test")
    assert StoryWorld(5).openings(50, "test") != StoryWorld(6).openings(50, "test")


def test_openings_are_in_one_split_and_the_corpus_in_train() -> None:
    world = StoryWorld(1)
    prompts = {split: world.openings(1500, split) for split in SPLITS}
    assert all(len(set(openings)) == 1500 for openings in prompts.values())
    assert all(not set(prompts[a]) & set(prompts[b]) for a in SPLITS for b in SPLITS if a != b)
    corpus = {opening for opening, _ in world.stories(2000, "sft")}
    assert not corpus & {*prompts["selection"], *prompts["test"]}
    shares = Counter(map(g.split_of, (o for split in SPLITS for o in StoryWorld(9).openings(100, split))))
    assert shares == {"train": 100, "selection": 100, "test": 100}


def test_too_many_openings_raise() -> None:
    with pytest.raises(ValueError, match="too few openings"):
        StoryWorld(0).openings(10**6, "test")


# --- the reward --------------------------------------------------------------------------------------------------


def test_flawless_story_gets_the_highest_reward() -> None:
    scores = gold(GOOD)
    assert {key: scores[key] for key in ("coherence", "plot", "freshness", "vividness", "brevity", "fluency")} == {
        "coherence": 1.0, "plot": 1.0, "freshness": 1.0, "vividness": 1.0, "brevity": 1.0, "fluency": 1.0,
    }  # fmt: skip
    assert scores["reward"] == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("component", "old", "new"),
    [
        pytest.param("coherence", "Mia pulled", "Tom pulled", id="another-hero"),
        pytest.param("coherence", "Mia smiled", "He smiled", id="wrong-pronoun"),
        pytest.param("coherence", "the kite came", "the boat came", id="another-thing"),
        pytest.param("coherence", "At last the kite", "At last the blue kite", id="another-color"),
        pytest.param("coherence", "At last the kite came loose.", "The wind blew over the hills.", id="ramble"),
        pytest.param("plot", "But the kite was stuck in a tall tree. ", "", id="no-problem"),
        pytest.param("plot", "Mia pulled it with a long rope. ", "", id="no-attempt"),
        pytest.param("plot", "At last the kite came loose. ", "", id="no-resolution"),
        pytest.param("plot", " Mia smiled and danced home.", "", id="no-ending"),
        pytest.param("plot", "Mia pulled it with a long rope", "Mia told the crow a funny tale", id="other-plot"),
        pytest.param("freshness", "At last", "Mia pulled it with a long rope. At last", id="repeated-sentence"),
        pytest.param("vividness", "tall ", "", id="fewer-adjectives"),
        pytest.param(
            "brevity",
            "At last",
            "One sunny morning Mia set out. Every quiet night she thought of it. At last",
            id="long",
        ),
        pytest.param("fluency", "pulled it with", "with it pulled", id="word-order"),
        pytest.param("fluency", "danced", "qwxed", id="not-a-word"),
    ],
)
def test_each_fault_lowers_its_component_and_the_reward(component: str, old: str, new: str) -> None:
    assert old in GOOD
    worse = gold(GOOD.replace(old, new, 1))
    assert worse[component] < gold(GOOD)[component]
    assert worse["reward"] < gold(GOOD)["reward"] - 0.1


def test_plot_score_depends_on_order() -> None:
    sentences = GOOD.strip().split(". ")
    assert gold(". ".join([sentences[2], sentences[0], sentences[1]]))["plot"] == 0.5


def test_reward_follows_the_documented_formula() -> None:
    scores = gold(GOOD.replace("Mia pulled", "Tom pulled").replace("tall ", ""))
    weighted = (
        4 * scores["coherence"] + 4 * scores["plot"]
        + 2 * scores["freshness"] + 2 * scores["vividness"] + 2 * scores["brevity"]
    )  # fmt: skip
    assert scores["coherence"] == pytest.approx(0.75 * 3 / 4 + 0.25)
    assert scores["reward"] == pytest.approx(10 * scores["fluency"] * weighted / 14)


@pytest.mark.parametrize("text", GIBBERISH)
def test_gibberish_gets_a_low_reward(text: str) -> None:
    assert 0 <= gold(text)["reward"] < 1
    assert math.isfinite(gold(GOOD, prompt=text)["reward"])


def test_word_salad_scores_below_bad_stories() -> None:
    rng = Random(0)
    salads = []
    for _ in range(50):
        words = GOOD.split()
        rng.shuffle(words)
        salads.append(" " + " ".join(words))
    assert max(gold(salad)["reward"] for salad in salads) < 4


@settings(max_examples=200, deadline=None)
@given(st.text(), st.text())
def test_any_text_gets_a_finite_score(prompt: str, completion: str) -> None:
    assert all(0 <= value <= 10 for value in gold(completion, prompt).values())


def test_unequal_numbers_of_prompts_and_completions_raise() -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        GoldReward()([PROMPT, PROMPT], [GOOD])


def test_reward_varies_on_the_corpus_and_does_not_follow_length() -> None:
    stories = StoryWorld(0).stories(2000, "test")
    rewards = torch.tensor(GoldReward()(*zip(*stories, strict=True))["reward"])
    lengths = torch.tensor([float(len(continuation.split())) for _, continuation in stories])
    assert 0.8 < rewards.std() < 1.6
    assert abs(spearman(rewards, lengths)) < 0.3


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the rank correlation, with ties at their mean rank."""

    def rank(x: torch.Tensor) -> torch.Tensor:
        return (x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2

    return float(torch.corrcoef(torch.stack([rank(a), rank(b)]))[0, 1])


# --- the pairs ---------------------------------------------------------------------------------------------------


def source(**changes: object) -> StoriesSource:
    settings = dict(
        seed=0,
        num_sft=40,
        num_prompts=30,
        selection_prompts=8,
        test_prompts=9,
        pairs_per_prompt=2,
        limit=None,
        labels="soft",
    )
    return StoriesSource(**{**settings, **changes})


def writer(prompts: list[str], n: int) -> list[list[Completion]]:
    """Return corpus continuations for any prompts, in place of the reference model."""
    stories = StoryWorld(7).stories(n * len(prompts), f"writer{len(prompts)}")
    texts = [Completion(f" {continuation}", True) for _, continuation in stories]
    return [texts[i * n : (i + 1) * n] for i in range(len(prompts))]


def test_supervised_rows_are_corpus_stories_split_at_a_space() -> None:
    rows = source().sft_rows()
    assert len(rows) == 40 and [row.where for row in rows[:2]] == ["stories:sft:0", "stories:sft:1"]
    assert all(row.rejected is None and row.chosen.startswith(" ") and not row.prompt.endswith(" ") for row in rows)


def test_rows_have_split_place_and_documented_number() -> None:
    stories = source()
    rows = stories.rows(writer)
    assert Counter(row.split for row in rows) == {"train": 60, "selection": 16, "test": 18}
    assert stories.dropped_pairs == {"unfinished": 0, "identical": 0}
    assert len({row.where for row in rows}) == len(rows) and rows[3].where == "stories:train:3"
    for split in SPLITS:
        assert {row.prompt for row in rows if row.split == split} == set(stories.prompts(split))
    assert rows == source().rows(writer)
    assert rows != source(seed=1).rows(writer)


def test_soft_labels_are_probabilities_of_the_same_outcomes_as_hard_labels() -> None:
    soft, hard = source(labels="soft").rows(writer), source(labels="hard").rows(writer)
    assert [(row.chosen, row.rejected) for row in soft] == [(row.chosen, row.rejected) for row in hard]
    assert all(row.preference is None for row in hard)
    for row in soft:
        margin = gold(row.chosen, row.prompt)["reward"] - gold(row.rejected, row.prompt)["reward"]
        assert row.preference == pytest.approx(1 / (1 + math.exp(-margin)))


def test_better_completion_is_chosen_with_bradley_terry_probability() -> None:
    better, worse = GOOD, GOOD.replace("Mia pulled", "Tom pulled").replace("tall ", "")

    def two(prompts: list[str], n: int) -> list[list[Completion]]:
        pair = [Completion(worse, True), Completion(better, True)]
        return [pair * (n // 2) for _ in prompts]

    stories = source(num_prompts=300, pairs_per_prompt=10)
    expected, won, total = 0.0, 0, 0
    for row in stories.rows(two):
        won += row.chosen == better
        expected += sigmoid(gold(better, row.prompt)["reward"] - gold(worse, row.prompt)["reward"])
        total += 1
    assert 0.55 < expected / total < 0.95
    assert abs(won - expected) < 4 * math.sqrt(total) / 2


def test_dropped_pairs_are_counted_and_do_not_change_other_labels() -> None:
    def broken(prompts: list[str], n: int) -> list[list[Completion]]:
        groups = writer(prompts, n)
        groups[0] = [groups[0][0], groups[0][0], *groups[0][2:]]
        groups[1] = [groups[1][0], Completion(groups[1][1].text, False), *groups[1][2:]]
        return groups

    stories = source()
    rows, whole = stories.rows(broken), source().rows(writer)
    assert stories.dropped_pairs == {"unfinished": 3, "identical": 3}
    kept = {row.where: row for row in rows}
    assert len(rows) == len(whole) - 6
    assert all(kept[row.where] == row for row in whole if row.where in kept)


def test_unknown_labels_raise() -> None:
    with pytest.raises(ValueError, match="soft, hard or deterministic"):
        source(labels="medium")


@pytest.mark.parametrize("x", [-800.0, -2.5, 0.0, 1e-3, 30.0, 800.0])
def test_sigmoid_matches_torch_without_overflow(x: float) -> None:
    assert sigmoid(x) == pytest.approx(float(torch.sigmoid(torch.tensor(x, dtype=torch.float64))), abs=1e-12)


# --- the tokenizer and the model ---------------------------------------------------------------------------------

TOKENIZER = dict(vocab_size=1024, num_stories=300, seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(**TOKENIZER)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_decodes_to_itself(tokenizer, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_special_tokens_are_distinct_and_never_added(tokenizer) -> None:
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer(PROMPT)["input_ids"] == encode(tokenizer, PROMPT)
    assert len(tokenizer) <= 1024
    with pytest.raises(ValueError, match="need 259"):
        build_tokenizer(vocab_size=200, num_stories=1, seed=0)


def test_prompt_and_completion_meet_at_a_token_boundary(tokenizer) -> None:
    rows = source().sft_rows() + source().rows(writer)
    for row in rows:
        for completion in filter(None, (row.chosen, row.rejected)):
            both = encode(tokenizer, row.prompt) + encode(tokenizer, completion)
            assert both == encode(tokenizer, row.prompt + completion)


def test_words_of_the_world_are_single_tokens(tokenizer) -> None:
    words = [*g.NAMES, *g.THINGS, *g.QUALITIES]
    assert all(len(encode(tokenizer, f" {word}")) == 1 for word in words)


@pytest.mark.slow
def test_two_processes_build_the_same_tokenizer(tokenizer) -> None:
    program = f"from spo.models.tiny import build_tokenizer as b; print(b(**{TOKENIZER}).backend_tokenizer.to_str())"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == tokenizer.backend_tokenizer.to_str()


def test_tiny_model_has_its_own_seed(tokenizer, tmp_path) -> None:
    sizes = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
    )  # fmt: skip
    before = torch.get_rng_state()
    one, same, other = (build_tiny(tokenizer, **sizes, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert one.lm_head.weight is one.model.embed_tokens.weight
    assert one.config.eos_token_id == tokenizer.eos_token_id and one.config.vocab_size == len(tokenizer)
