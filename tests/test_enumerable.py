"""The enumerable language: responses, labels by their formulas, tokens, and runs on it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from spo import cli
from spo.config.compose import compose
from spo.config.plan import plan
from spo.data import Completion, Dropped, Renderer, Row
from spo.data.enumerable import EnumerableReward, EnumerableSource, Language, language_tokenizer
from spo.errors import ConfigProblems
from spo.stages.prepare import prepare_run
from tests.commands import enter, history, job, rows, shared_cache
from tests.helpers import completion_logps, sequences

ENUMERABLE = ("data=enumerable", "threads=1", "probe.num_prompts=4", "callbacks=none")


def source(**changes: Any) -> EnumerableSource:
    settings: dict[str, Any] = {
        "seed": 0,
        "num_prompts": 2,
        "num_symbols": 3,
        "prompt_symbols": 1,
        "max_new_tokens": 3,
        "reward_scale": 1.0,
        "sampler": "full",
        "labels": "soft",
        "num_pairs": None,
        "support_share": 0.5,
        "list_size": 2,
    }
    return EnumerableSource(**settings | changes)


def made(**changes: Any) -> list[Row]:
    return source(**changes).rows(no_model)


def no_model(prompts: Sequence[str], n: int) -> list[list[Completion]]:
    raise AssertionError("these rows need no model")


def reward_of(language: Language, prompt: str, response: str) -> float:
    return float(language.rewards[language.prompts.index(prompt), language.responses.index(response)])


def renderer(num_symbols: int = 3, prompt_symbols: int = 1, max_new_tokens: int = 3) -> Renderer:
    length = 1 + prompt_symbols + max_new_tokens
    return Renderer(language_tokenizer(num_symbols), length, "trim_completion", allow_empty=True)


# --- the responses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_symbols", "max_new_tokens"), [(2, 1), (2, 5), (3, 3), (5, 2)])
def test_responses_are_unique_and_none_is_prefix_of_another(num_symbols: int, max_new_tokens: int) -> None:
    language = source(num_symbols=num_symbols, max_new_tokens=max_new_tokens).language
    assert len(language.responses) == sum(num_symbols**k for k in range(max_new_tokens)) + num_symbols**max_new_tokens
    assert language.responses[0] == "" and language.prompts == ("a", "b")
    assert language.rewards.shape == language.support.shape == (2, len(language.responses))
    make = renderer(num_symbols, 1, max_new_tokens)
    leaves = set()
    for response in language.responses:
        pair = make.render(Row("b", response))
        assert not isinstance(pair, Dropped) and pair.prompt_ids == (0, 2) and pair.chosen_text == response
        assert make.decode(pair.chosen_ids) == response
        leaves.add(pair.chosen_ids)
    # The same set in another way: all sequences of max_new_tokens tokens, cut after their first end-of-text.
    tokens = itertools.product(range(num_symbols + 1), repeat=max_new_tokens)
    assert leaves == {ids[: ids.index(0) + 1] if 0 in ids else ids for ids in tokens}
    assert not any(a != b and b[: len(a)] == a for a in leaves for b in leaves)


def test_every_split_has_prompts_which_may_be_empty() -> None:
    assert source(num_prompts=5, prompt_symbols=2).prompts("test") == ["aa", "ab", "ac", "ba", "bb"]
    assert source(num_prompts=1, prompt_symbols=0).prompts("train") == [""]
    assert renderer(prompt_symbols=0).prompt_ids("") == (0,)
    assert source().sft_rows() is None


def test_disallowed_empty_completion_is_dropped() -> None:
    strict = Renderer(language_tokenizer(3), 5, "trim_completion")
    assert strict.render(Row("a", "", "b")) == Dropped("empty", "")


def test_tokenizer_knows_only_the_symbols() -> None:
    tokenizer = language_tokenizer(4)
    assert tokenizer("abca")["input_ids"] == [1, 2, 3, 1] and tokenizer.decode([4, 1]) == "da"
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0 and len(tokenizer) == 5
    with pytest.raises(Exception, match="Missing"):
        tokenizer("abe")


def test_source_follows_seed() -> None:
    assert np.array_equal(source().language.rewards, source().language.rewards)
    assert not np.array_equal(source().language.rewards, source(seed=1).language.rewards)
    for settings in (
        {"num_pairs": 50},
        {"labels": "hard"},
        {"sampler": "restricted"},
        {"list_size": 3, "num_pairs": 9},
    ):
        assert made(**settings) == made(**settings) != made(**settings, seed=1)
    scale = source(num_symbols=8, max_new_tokens=4, num_pairs=1, reward_scale=2.5).language.rewards.std()
    assert scale == pytest.approx(2.5, rel=0.03)


# --- labels --------------------------------------------------------------------------------------------------------


def test_all_pairs_appear_once_with_bradley_terry_probability() -> None:
    pairs, language = made(), source().language
    assert len(pairs) == 2 * 40 * 39 // 2 == len({row.where for row in pairs})
    assert len({(row.prompt, frozenset((row.chosen, row.rejected))) for row in pairs}) == len(pairs)
    for row in pairs:
        r = [reward_of(language, row.prompt, text) for text in (row.chosen, row.rejected)]
        assert row.preference == pytest.approx(math.exp(r[0]) / (math.exp(r[0]) + math.exp(r[1])), abs=1e-15)
        assert row.preference >= 0.5 and row.weight is None and row.worse == ()
        i, j = (language.responses.index(text) for text in (row.chosen, row.rejected))
        assert row.where == f"enumerable:{language.prompts.index(row.prompt)}:{i}-{j}"


def test_preferences_are_stable_for_any_reward_difference() -> None:
    rewards = np.array([[0.0, 700.0, 30.0]])
    language = Language(("a",), ("", "a", "b"), rewards, np.ones((1, 3), bool))
    first, second = np.array([0, 1, 0, 2]), np.array([1, 0, 2, 2])
    with np.errstate(all="raise", under="ignore"):
        found = language.preference(0, first, second)
    assert found.tolist() == pytest.approx([math.exp(-700), 1.0, math.exp(-30) / (1 + math.exp(-30)), 0.5], rel=1e-12)
    assert language.preference(0, 0, 2) == language.order_probability(0, np.array([0, 2]))


def test_drawn_pairs_are_uniform_and_hard_labels_bradley_terry() -> None:
    settings = {"num_symbols": 2, "max_new_tokens": 1, "num_prompts": 1, "num_pairs": 6000}  # 3 responses, 3 pairs
    language, soft, hard = source(**settings).language, made(**settings), made(**settings, labels="hard")
    counts = Counter(frozenset((row.chosen, row.rejected)) for row in soft)
    assert len(counts) == 3 and all(row.chosen != row.rejected for row in soft)
    assert all(abs(n - 2000) < 4 * math.sqrt(6000 * 2 / 9) for n in counts.values())
    assert all(row.preference is None for row in hard)
    assert [{row.chosen, row.rejected} for row in hard] == [{row.chosen, row.rejected} for row in soft]
    for pair, n in counts.items():
        a, b = pair
        p = 1 / (1 + math.exp(reward_of(language, "a", b) - reward_of(language, "a", a)))
        wins = sum((row.chosen, row.rejected) == (a, b) for row in hard)
        assert abs(wins - n * p) < 4 * math.sqrt(n * p * (1 - p))
    assert len(made(labels="hard")) == 1560


def test_restricted_support_is_never_left() -> None:
    restricted = source(sampler="restricted", support_share=0.25)
    language = restricted.language
    assert language.support.sum(axis=1).tolist() == [10, 10] and (language.support[0] != language.support[1]).any()
    for settings in ({}, {"num_pairs": 500}, {"list_size": 3, "labels": "hard"}):
        seen: dict[str, set[str]] = {"a": set(), "b": set()}
        for row in made(sampler="restricted", support_share=0.25, **settings):
            seen[row.prompt] |= {row.chosen, row.rejected, *row.worse}
        for prompt, support in zip(language.prompts, language.support, strict=True):
            assert seen[prompt] == {text for text, kept in zip(language.responses, support, strict=True) if kept}
    assert source(sampler="restricted", support_share=1e-9).language.support.sum(axis=1).tolist() == [2, 2]
    assert np.array_equal(language.rewards, source().language.rewards)  # the truth does not depend on the data


def plackett_luce(rewards: Sequence[float]) -> float:
    weights = [math.exp(reward) for reward in rewards]
    return math.prod(weight / sum(weights[k:]) for k, weight in enumerate(weights))


@pytest.mark.parametrize("size", [3, 4])
def test_ranking_has_all_orders_with_probabilities(size: int) -> None:
    settings = {"num_symbols": 2, "max_new_tokens": 2, "list_size": size}  # 7 responses
    language, lists = source(**settings).language, made(**settings)
    assert len(lists) == 2 * math.comb(7, size) * math.factorial(size)
    total: Counter[tuple[str, frozenset[str]]] = Counter()
    before: Counter[tuple[str, str, str]] = Counter()
    for row in lists:
        order = (row.chosen, row.rejected, *row.worse)
        assert row.preference is None and row.weight is not None and len(row.worse) == size - 2
        probability = plackett_luce([reward_of(language, row.prompt, text) for text in order])
        assert row.weight == pytest.approx(math.factorial(size) * probability, rel=1e-12)
        total[row.prompt, frozenset(order)] += probability
        for a, b in itertools.combinations(order, 2):
            before[row.prompt, a, b] += probability
    assert all(value == pytest.approx(1, abs=1e-12) for value in total.values())
    assert sum(row.weight for row in lists) / len(lists) == pytest.approx(1, abs=1e-12)
    for (prompt, a, b), won in before.items():  # of two, the one ranked first follows Bradley and Terry
        margin = reward_of(language, prompt, a) - reward_of(language, prompt, b)
        assert won / (won + before[prompt, b, a]) == pytest.approx(1 / (1 + math.exp(-margin)), abs=1e-12)


def test_drawn_rankings_follow_plackett_luce() -> None:
    settings = {"num_symbols": 2, "max_new_tokens": 1, "num_prompts": 1, "num_pairs": 5000, "list_size": 3}
    language, lists = source(**settings).language, made(**settings, labels="hard")
    counts = Counter((row.chosen, row.rejected, *row.worse) for row in lists)
    assert sum(counts.values()) == 5000 and all(row.weight is None for row in lists)
    for order in itertools.permutations(language.responses):
        p = plackett_luce([reward_of(language, "a", text) for text in order])
        assert abs(counts[order] - 5000 * p) < 4 * math.sqrt(5000 * p * (1 - p))


# --- pairs of the reference model ----------------------------------------------------------------------------------


def test_reference_pairs_are_its_completions() -> None:
    def complete(prompts: Sequence[str], n: int) -> list[list[Completion]]:
        assert (list(prompts), n) == (["a", "b"], 4)
        texts = [["", "abc", "b", "b"], ["c", "a", "aaa", "ab"]]
        return [[Completion(text, len(text) < 3) for text in group] for group in texts]

    pairs = source(sampler="reference", num_pairs=2)
    found = [(row.prompt, {row.chosen, row.rejected}) for row in pairs.rows(complete)]
    assert found == [("a", {"", "abc"}), ("b", {"c", "a"}), ("b", {"aaa", "ab"})]
    assert pairs.dropped_pairs == {"identical": 1} and pairs.samples_rows and not source().samples_rows
    hard = source(sampler="reference", num_pairs=2, labels="hard").rows(complete)
    assert [(row.prompt, {row.chosen, row.rejected}) for row in hard] == found
    assert all(row.preference is None for row in hard)


def test_reward_is_looked_up() -> None:
    reward, language = EnumerableReward(source()), source().language
    found = reward(["a", "b", "a"], ["", "ccc", "ab"])["reward"]
    expected = [("a", ""), ("b", "ccc"), ("a", "ab")]
    assert found == [reward_of(language, prompt, response) for prompt, response in expected]
    with pytest.raises(ValueError, match="prompt 'c' with completion 'abcd' is not in the language"):
        reward(["a", "c"], ["a", "abcd"])


# --- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "half"}, "data.source.sampler=half: choose full, reference or restricted"),
        ({"labels": "medium"}, "data.source.labels=medium: choose soft, hard or weighted"),
        ({"num_symbols": 1}, "data.source.num_symbols=1: must be from 2 to 26"),
        ({"num_symbols": 27}, "data.source.num_symbols=27: must be from 2 to 26"),
        ({"num_prompts": 4}, "data.source.num_prompts=4: 1 symbols out of 3 make 3 prompts"),
        ({"prompt_symbols": -1}, "data.source.num_prompts=2: -1 symbols"),
        ({"max_new_tokens": 0}, "data.max_new_tokens=0"),
        ({"max_new_tokens": 10}, "data.source.num_symbols=3 and data.max_new_tokens=10 make more than 20,000"),
        (
            {"list_size": 5, "num_pairs": 9},
            "data.source.list_size=5: data.source.labels=soft makes .* lists of up to 4",
        ),
        (
            {"list_size": 9, "num_symbols": 2, "max_new_tokens": 1},
            "data.source.list_size=9: a prompt has only 3 responses",
        ),
        ({"list_size": 1}, "data.source.list_size=1, num_pairs=None"),
        ({"num_pairs": 0}, "num_pairs=0"),
        ({"sampler": "reference"}, "data.source.num_pairs=null: data.source.sampler=reference"),
        (
            {"sampler": "reference", "num_pairs": 9, "list_size": 3},
            "data.source.list_size=3: .*samples pairs; set list_size=2",
        ),
        ({"support_share": 0}, "data.source.support_share=0: must be above 0 and at most 1"),
        ({"reward_scale": -1}, "data.source.reward_scale=-1: must be at least 0 and finite"),
    ],
)
def test_invalid_languages_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(**changes)


def test_largest_language_allows_all_pairs() -> None:
    assert len(source(num_symbols=2, max_new_tokens=6, num_prompts=1).rows(no_model)) == 127 * 126 // 2


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["data.source.num_pairs=0"], "data.source.num_pairs=0: must be at least 1"),
        (["data.source.labels=softt"], "data.source.labels=softt: choose soft, hard or weighted"),
        (["data.max_new_tokens=9"], "data.source.num_symbols=3 and data.max_new_tokens=9 make more than"),
        (["data.max_length=9"], "data.max_length and data.truncation follow from the language"),
        (["data.truncation=drop_pair"], "data.max_length and data.truncation follow from the language"),
    ],
)
def test_command_rejects_invalid_language_early(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigProblems) as caught:
        plan(["data=enumerable", *overrides])
    assert part in str(caught.value)


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_cache(tmp_path_factory)


def policy_of(folder: Path, language: Language, max_new_tokens: int = 3) -> torch.Tensor:
    """Return ``(P, R)`` log-probabilities of all responses, computed without the run's code."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in language.prompts:
        ids = [0, *tokenizer(prompt)["input_ids"]]
        ended = [[*tokenizer(text)["input_ids"], 0][:max_new_tokens] for text in language.responses]
        with torch.no_grad():
            found.append(completion_logps(model, sequences([(ids, completion) for completion in ended])))
    return torch.stack(found)


def test_command_runs(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", *ENUMERABLE, "model=tabular", "trainer.max_steps=3", "logger=record", "hydra.run.dir=here"]
    enter(tmp_path, cache, monkeypatch)
    assert cli.main(words) == 0
    metrics = history(tmp_path / "here")[-1]
    assert {"train/kl", "val/loss", "val/rewards/accuracies"} <= metrics.keys()


@pytest.mark.parametrize("model", ["tabular", "tiny"])
def test_run_saves_policy_and_samples(model: str, tmp_path: Path, cache: Path) -> None:
    job(
        tmp_path / "here",
        cache,
        *ENUMERABLE,
        f"model={model}",
        "trainer.max_steps=3",
        "evaluation.samples_per_prompt=9",
    )
    language = source().language
    logps = policy_of(tmp_path / "here" / "policy", language)
    assert logps.dtype == (torch.float64 if model == "tabular" else torch.float32)
    torch.testing.assert_close(
        logps.double().exp().sum(1), torch.ones(2).double(), rtol=0, atol=1e-12 if model == "tabular" else 1e-6
    )
    assert len(rows(tmp_path / "here" / "samples.jsonl")) == 18
    for sample in rows(tmp_path / "here" / "samples.jsonl"):
        assert sample["reward"] == reward_of(language, sample["prompt"], sample["completion"])
        p, r = language.prompts.index(sample["prompt"]), language.responses.index(sample["completion"])
        assert sample["logp_policy"] == pytest.approx(float(logps[p, r]), abs=1e-5)


def test_inspect_shows_rows(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "data=enumerable", "model=tabular", f"paths.cache={cache}", "--limit", "1"]) == 0
    shown = capsys.readouterr().out
    assert "enumerable:0:" in shown and "preference: 0." in shown and "1,560" in shown


@pytest.mark.parametrize("method", ["dpo", "ipo", "spo"])
def test_methods_run_with_defaults(method: str, tmp_path: Path, cache: Path) -> None:
    metrics = job(tmp_path / "run", cache, *ENUMERABLE, "model=tabular", f"method={method}", "trainer.max_steps=2")
    assert metrics["data/pairs_used"] == 1560 and "eval/win_rate" in metrics


def test_spo_reaches_its_optimum(tmp_path: Path, cache: Path) -> None:
    overrides = ["model=tabular", "method=spo", "regularizer=none", "alpha=0.7", "trainer.max_steps=300"]
    job(tmp_path / "run", cache, *ENUMERABLE, *overrides)
    language = source().language
    optimum = (torch.from_numpy(language.rewards) / 0.7).softmax(1)
    distance = (policy_of(tmp_path / "run" / "policy", language).exp() - optimum).abs().sum(1) / 2
    assert float(distance.max()) < 1e-3


def test_reference_pairs_have_frequencies_of_model(tmp_path: Path, cache: Path) -> None:
    number = 400
    overrides = ["data.source.sampler=reference", f"data.source.num_pairs={number}", f"paths.cache={cache}"]
    cfg = compose(["data=enumerable", "model=tabular", *overrides], run_dir=tmp_path)
    prepared = prepare_run(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))  # type: ignore[arg-type]
    pairs, language = prepared.pairs.train, source().language
    assert prepared.pairs.counts["read"] == 2 * number == len(pairs) + prepared.pairs.counts["dropped"]
    assert prepared.pairs.selection == prepared.pairs.test == pairs
    logps = policy_of(Path(prepared.base), language)
    for p, prompt in enumerate(language.prompts):
        kept = [pair for pair in pairs if pair.prompt_text == prompt]
        q = logps[p].exp().numpy()
        joint = np.outer(q, q) * (1 - np.eye(len(q)))
        share = 2 * joint.sum(1) / joint.sum()  # of the pairs that hold a response
        counts = Counter(text for pair in kept for text in (pair.chosen_text, pair.rejected_text))
        z = [
            (counts[text] - len(kept) * s) / math.sqrt(len(kept) * s * (1 - s))
            for text, s in zip(language.responses, share, strict=True)
        ]
        assert max(map(abs, z)) < 4.5
        expected = number * (1 - float((q**2).sum()))
        assert abs(len(kept) - expected) < 4 * math.sqrt(expected * float((q**2).sum()))
