"""Numbers of each completion, and numbers computed from texts: from rows of every kind to what a loss reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from spo.data import (
    DataError,
    FileSource,
    LabelledFileSource,
    PreparedPairs,
    RankedFileSource,
    Renderer,
    Row,
    RowError,
    prepare,
)
from spo.data.collate import collate
from spo.data.gold_columns import gold_columns
from spo.data.source import Source
from spo.data.stories import StoriesSource
from spo.losses import DataNeeds, Feature, LabelledLoss, ListLoss, Loss, PreferenceLoss, SFTLoss
from spo.objective import concat_logps
from spo.objective.scored import loss_inputs
from spo.stages.pairs import no_completer
from spo.types import LabelledLogps, ListLogps, Logps, PairLogps
from tests.data.tokenizers_built_here import ENDS_IN_EOS, build
from tests.helpers import PAD

TOKENIZER = build("adds_bos")
PAIR = {"prompt": "What is red?", "chosen": " A rose.", "rejected": " The sky."}
RANKED = {"prompt": "What is red?", "responses": [" The sky.", " A rose.", " Snow."], "order": [1, 2, 0]}
EACH = {"reward": Feature("reward", each=True)}


class PairReads(PreferenceLoss):
    uses_reference = False
    features: Mapping[str, Feature] = EACH

    def of_pairs(self, pair: PairLogps, *, alpha: float, beta: float) -> Tensor:
        chosen, rejected = pair.features["reward"].unbind(-1)
        return chosen - 10 * rejected


class CompletionReads(LabelledLoss):
    uses_reference = False
    features: Mapping[str, Feature] = EACH

    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> Tensor:
        return logps.features["reward"]


class ListReads(ListLoss):
    uses_reference = False
    features: Mapping[str, Feature] = EACH

    def of_ranking(self, lists: ListLogps, *, alpha: float, beta: float) -> Tensor:
        digits = 10.0 ** torch.arange(lists.mask.shape[1])
        return (lists.features["reward"] * digits).sum(-1)


class BestReads(SFTLoss):
    features: Mapping[str, Feature] = EACH


def with_features(loss: Loss[Any], **features: Feature) -> Loss[Any]:
    loss.features = features
    return loss


def write(path: Path, *rows: Mapping[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def pairs(path: Path, *rows: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> FileSource:
    return FileSource(write(path / "a.jsonl", *rows), columns, "stop")


def lists(path: Path, *rows: Mapping[str, Any], limit: int | None = None, **columns: str) -> RankedFileSource:
    return RankedFileSource(write(path / "a.jsonl", *rows), columns, "stop", limit)


def splits(source: Source, loss: Loss[Any], **options: Any) -> PreparedPairs:
    source.needs = DataNeeds.of(loss)
    return prepared(source.rows(no_completer), loss, name_of=source.column_name, **options)


def prepared(rows: Sequence[Row], loss: Loss[Any], max_length: int = 64, **options: Any) -> PreparedPairs:
    renderer = Renderer(options.pop("tokenizer", TOKENIZER), max_length, options.pop("truncation", "drop_pair"))
    settings = {"seed": 0, "selection": 0.0, "test": 0.0, "min_pairs": 1, **options}
    return prepare(rows, renderer, needs=DataNeeds.of(loss), **settings)


def inputs(found: PreparedPairs, loss: Loss[Any], batch_size: int = 99) -> Logps:
    """Return what the loss reads of all training rows, over batches."""
    parts = []
    for first in range(0, len(found.train), batch_size):
        part = found.train[first : first + batch_size]
        batch = collate(part, range(len(part)), PAD)
        parts.append(loss_inputs(loss, batch, torch.zeros(len(batch.sequences), dtype=torch.float64), None))
    return concat_logps(parts, loss.per_completion_features)


def numbers(source: Source, loss: Loss[Any], batch_size: int = 99) -> Any:
    return inputs(splits(source, loss), loss, batch_size).features["reward"].tolist()


def value(source: Source, loss: Loss[Any]) -> list[float]:
    losses: Tensor = loss(inputs(splits(source, loss), loss), alpha=1.0, beta=1.0)
    return losses.tolist()


# --- rows of every kind --------------------------------------------------------------------------------------------

WITH_NUMBERS = {**PAIR, "chosen_reward": 3, "rejected_reward": 5.5}


def test_each_completion_of_a_pair_has_its_number(tmp_path: Path) -> None:
    assert numbers(pairs(tmp_path, WITH_NUMBERS), PairReads()) == [[3.0, 5.5]]
    assert numbers(pairs(tmp_path, WITH_NUMBERS), CompletionReads()) == [3.0, 5.5]
    assert numbers(pairs(tmp_path, WITH_NUMBERS), ListReads()) == [[3.0, 5.5]]
    assert numbers(pairs(tmp_path, WITH_NUMBERS), BestReads()) == [[3.0, 5.5]]
    alone = {key: value for key, value in WITH_NUMBERS.items() if "rejected" not in key}
    assert numbers(pairs(tmp_path, alone, WITH_NUMBERS), BestReads()) == [[3.0], [3.0]]
    renamed = pairs(tmp_path, {**PAIR, "good": 1, "rejected_reward": 2}, columns={"chosen_reward": "good"})
    assert numbers(renamed, PairReads()) == [[1.0, 2.0]]


def test_pairs_of_columns_are_split_for_a_loss_of_labels(tmp_path: Path) -> None:
    loss = with_features(CompletionReads(), reward=Feature(("a", "b")), row=Feature("c"))
    source = pairs(tmp_path, {**PAIR, "a": 1, "b": 2, "c": 3})
    found = inputs(splits(source, loss), loss)
    assert found.features["reward"].tolist() == [1.0, 2.0] and found.features["row"].tolist() == [3.0, 3.0]


def test_a_soft_label_turns_the_numbers_with_the_completions(tmp_path: Path) -> None:
    row = {**WITH_NUMBERS, "preference": 0.75}
    first, second = 3 - 55.0, 5.5 - 30
    assert value(pairs(tmp_path, row), PairReads()) == [pytest.approx(0.75 * first + 0.25 * second)]
    assert value(pairs(tmp_path, row), ListReads()) == [pytest.approx(0.75 * (3 + 55) + 0.25 * (5.5 + 30))]
    assert value(pairs(tmp_path, row), CompletionReads()) == [3.0, 5.5]


def test_a_labelled_completion_has_one_number(tmp_path: Path) -> None:
    row = {"prompt": "Red?", "completion": " Yes.", "label": False, "reward": 2, "chosen_reward": 9}
    source = LabelledFileSource(write(tmp_path / "a.jsonl", row), None, "stop")
    assert numbers(source, CompletionReads()) == [2.0]
    source = LabelledFileSource(write(tmp_path / "b.jsonl", {**row, "mine": 4}), {"reward": "mine"}, "stop")
    assert numbers(source, CompletionReads()) == [4.0]
    del row["reward"]
    with pytest.raises(RowError, match=r"line 1: column 'reward': missing; method.loss reads it as the feature"):
        numbers(LabelledFileSource(write(tmp_path / "c.jsonl", row), None, "stop"), CompletionReads())


def test_numbers_of_a_list_follow_the_ranking(tmp_path: Path) -> None:
    row = {**RANKED, "rewards": [7, 8, 9]}
    assert numbers(lists(tmp_path, row), ListReads()) == [[8.0, 9.0, 7.0]]
    assert numbers(lists(tmp_path, row), BestReads()) == [[8.0, 9.0]]
    by_scores = {**row, "order": None, "scores": [0.5, 0.1, 2]}
    assert numbers(lists(tmp_path, by_scores), ListReads()) == [[9.0, 7.0, 8.0]]
    assert numbers(lists(tmp_path, {**row, "mine": [1, 2, 3]}, rewards="mine"), ListReads()) == [[2.0, 3.0, 1.0]]
    rng = Random(0)
    for _ in range(5):
        texts = [f" {word}" for word in ("one", "two", "three", "four", "five")]
        rng.shuffle(texts)
        order = rng.sample(range(5), 5)
        lengths = [float(len(text)) for text in texts]
        source = lists(tmp_path, {"prompt": "a?", "responses": texts, "order": order, "rewards": lengths}, limit=3)
        [pair] = splits(source, ListReads()).train
        assert pair.numbers["reward"] == tuple(float(len(text)) for text in pair.texts) and len(pair.texts) == 3


def test_dropped_responses_take_their_numbers_with_them(tmp_path: Path) -> None:
    row = {"prompt": "a?", "responses": [" b", "", " c", " b", " d"], "order": [2, 1, 0, 3, 4]}
    source = lists(tmp_path, {**row, "rewards": [0, 1, 2, 3, 4]})
    assert numbers(source, ListReads()) == [[2.0, 0.0, 4.0]]
    # Two texts with the same tokens after a cut.
    rows = [Row("a", "b c", "b d", worse=("e f",), columns={"rewards": (1, 2, 3)})]
    [pair] = prepared(rows, ListReads(), max_length=4, truncation="trim_completion").train
    assert pair.repeated == 1 and pair.numbers["reward"] == (1.0, 3.0)


def test_lists_of_different_lengths_are_one_input(tmp_path: Path) -> None:
    short = {"prompt": "And?", "responses": [" No.", " Yes."], "order": [1, 0], "rewards": [4, 5]}
    source = lists(tmp_path, short, {**RANKED, "rewards": [7, 8, 9]})
    loss = with_features(ListReads(), reward=EACH["reward"], embedding=Feature("embedding", size=2, make=_embed))
    expected = [[5.0, 4.0, 0.0], [8.0, 9.0, 7.0]]
    for size in (1, 2):
        found = inputs(splits(source, loss), loss, size)
        assert found.features["reward"].tolist() == expected
        assert found.features["embedding"].shape == (2, 2)
        assert loss(found, alpha=1.0, beta=1.0).tolist() == [45.0, 798.0]


def _embed(prompts: Sequence[str], completions: Sequence[str] | None) -> list[list[float]]:
    assert completions is None
    return [[float(len(text)), 1.0] for text in prompts]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rewards": None}, "missing; method.loss reads it as the feature 'reward'"),
        ({"rewards": [1, 2]}, "must have 3 numbers for 3 responses, not 2"),
        ({"rewards": 1}, "must be a list of 3 numbers for 3 responses, not a number"),
        ({"rewards": [1, None, 2]}, "must be a number, not null"),
        ({"rewards": [1, float("nan"), 2]}, "must be finite, not nan"),
        ({"rewards": [1, float("inf"), 2]}, "must be finite, not inf"),
        ({"rewards": [1, 2**24 + 1, 2]}, "float32, in which a loss reads it, would round 16777217"),
    ],
)
def test_bad_numbers_of_a_list_are_named(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    source = lists(tmp_path, {**RANKED, "rewards": [1, 2, 3]}, {**RANKED, "prompt": "And?", **change})
    with pytest.raises(RowError) as error:
        splits(source, ListReads())
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}, line 2: column 'rewards': {reason}")


def test_bad_numbers_of_a_pair_are_named(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"line 1: column 'rejected_reward': missing; method.loss"):
        splits(pairs(tmp_path, {**PAIR, "chosen_reward": 1}), PairReads())
    loss = with_features(PairReads(), reward=Feature("reward", each=True, make=_lengths))
    with pytest.raises(RowError, match=r"'rejected_reward': missing, but 'chosen_reward' is there: give both or"):
        splits(pairs(tmp_path, {**PAIR, "chosen_reward": 1}), loss)
    with pytest.raises(RowError, match="column 'bad': must be a number, not text"):
        splits(
            pairs(tmp_path, {**PAIR, "chosen_reward": 1, "bad": "x"}, columns={"rejected_reward": "bad"}), PairReads()
        )


def test_declarations_that_contradict_themselves_are_refused() -> None:
    for bad in ({"each": True, "size": 2}, {"default": 0.0, "make": _lengths}):
        with pytest.raises(ValueError, match=r"size must be|make computes"):
            Feature("a", **bad)
    with pytest.raises(ValueError, match="each=True takes one name"):
        Feature(("a", "b"), each=True)


# --- numbers computed from texts -----------------------------------------------------------------------------------


def _lengths(prompts: Sequence[str], completions: Sequence[str] | None) -> list[float]:
    assert completions is not None
    return [100.0 * len(prompt) + len(text) for prompt, text in zip(prompts, completions, strict=True)]


@pytest.mark.parametrize("loss", [PairReads, CompletionReads, ListReads])
def test_only_missing_numbers_are_computed(loss: type[Loss[Any]], tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def make(prompts: Sequence[str], completions: Sequence[str] | None) -> list[float]:
        calls.append(list(completions or ()))
        return _lengths(prompts, completions)

    reads = with_features(loss(), reward=Feature("reward", each=True, make=make))
    source = pairs(tmp_path, WITH_NUMBERS, {**PAIR, "prompt": "And?"}, {**PAIR, "chosen": " Blood."})
    found = torch.tensor(numbers(source, reads)).flatten().tolist()
    assert found == [3.0, 5.5, 408.0, 409.0, 1207.0, 1209.0]
    assert calls == [[" A rose.", " The sky.", " Blood.", " The sky."]]


def test_numbers_of_lists_and_labelled_completions_are_computed(tmp_path: Path) -> None:
    made = Feature("reward", each=True, make=_lengths)
    ranked = lists(tmp_path, RANKED, {**RANKED, "prompt": "And?", "rewards": [7, 8, 9]})
    assert numbers(ranked, with_features(ListReads(), reward=made)) == [[1208.0, 1206.0, 1209.0], [8.0, 9.0, 7.0]]
    row = {"prompt": "Red?", "completion": " Yes.", "label": True}
    source = LabelledFileSource(write(tmp_path / "b.jsonl", row, {**row, "reward": 2}), None, "stop")
    assert numbers(source, with_features(CompletionReads(), reward=made)) == [405.0, 2.0]


def test_a_number_of_the_row_is_computed_from_the_prompt_once_per_split() -> None:
    calls: list[list[str]] = []

    def make(prompts: Sequence[str], completions: Sequence[str] | None) -> list[list[float]]:
        calls.append(list(prompts))
        return _embed(prompts, completions)

    loss = with_features(CompletionReads(), reward=Feature("embedding", size=2, make=make))
    rows = [Row("a" * i, " b", " c", split="test" if i == 3 else "train") for i in (1, 2, 3)]
    found = prepared(rows, loss)
    assert calls == [["a", "aa"], ["aaa"]]
    assert [pair.features["reward"] for pair in found.train] == [(1.0, 1.0)] * 2 + [(2.0, 1.0)] * 2
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Red?"})
    answer, other = (({"role": "assistant", "content": text},) for text in ("Yes.", "No."))
    prepared([Row(turns, answer, other)], loss, tokenizer=build("adds_bos", ENDS_IN_EOS))
    assert calls[2:] == [["Be brief.\nRed?"]]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1.0], "it must return one value for each of 2 texts, not 1"),
        ([1.0, float("nan")], "it must return a finite number for each text, not nan"),
        ([1.0, [2.0]], r"it must return a finite number for each text, not \[2.0\]"),
        (None, "no such language"),
    ],
)
def test_bad_results_are_refused_in_words(values: Any, reason: str) -> None:
    def make(prompts: Sequence[str], completions: Sequence[str] | None) -> list[float]:
        if values is None:
            raise ValueError("no such language")
        found: list[float] = values
        return found

    loss = with_features(PairReads(), reward=Feature("reward", each=True, make=make))
    with pytest.raises(DataError, match=f"method.loss: make of the feature 'reward', for the train split: {reason}"):
        prepared([Row("a", " b", " c")], loss)


def test_a_list_of_the_wrong_length_is_refused() -> None:
    loss = with_features(PairReads(), reward=Feature("embedding", size=3, make=_embed))
    with pytest.raises(DataError, match="it must return a list of 3 finite numbers for each text"):
        prepared([Row("a", " b", " c")], loss)


# --- columns of the story world ------------------------------------------------------------------------------------


def test_gold_columns_by_hand() -> None:
    names = ("chosen_reward", "rejected_reward", "chosen_win_rate", "rejected_win_rate", "flip_probability")
    log3 = 1.0986122886681098
    found = gold_columns(2 + log3, 2.0, 0.1, names)  # wins with probability 3/4
    assert found == {
        "chosen_reward": 2 + log3,
        "rejected_reward": 2.0,
        "chosen_win_rate": pytest.approx(5 / 8),
        "rejected_win_rate": pytest.approx(3 / 8),
        "flip_probability": pytest.approx(0.25 * 0.9 + 0.75 * 0.1),
    }
    assert gold_columns(1.0, 0.0, 0.0, ("rejected_reward", "other")) == {"rejected_reward": 0.0}


def test_stories_have_the_columns_that_a_loss_asks_for() -> None:
    def rows(*columns: str, labels: Any = "hard") -> list[Row]:
        source = StoriesSource(
            seed=0, num_sft=1, num_prompts=3, selection_prompts=0, test_prompts=1, pairs_per_prompt=2, limit=None,
            labels=labels, label_noise=0.2, responses="grammar",
        )  # fmt: skip
        source.needs = DataNeeds(features={name: Feature(name) for name in columns})
        return source.rows(no_completer)

    plain, asked = rows(), rows("chosen_reward", "rejected_reward", "flip_probability")
    assert [row.columns for row in plain] == [{}] * len(plain) and len(plain) > 4
    reward = StoriesSource(0, 1, 1, 0, 1, 1, None, "hard").reward
    for one, other in zip(plain, asked, strict=True):
        assert (one.prompt, one.chosen, one.rejected, one.preference) == (
            other.prompt, other.chosen, other.rejected, other.preference,
        )  # fmt: skip
        prompts = [str(one.prompt)] * 2
        scores = reward(prompts, [str(one.chosen), str(one.rejected)])["reward"]
        assert [other.columns["chosen_reward"], other.columns["rejected_reward"]] == scores
        assert gold_columns(scores[0], scores[1], 0.2, other.columns) == other.columns
        assert "chosen_win_rate" not in other.columns
    # A soft label states the probability already.
    assert {row.columns["flip_probability"] for row in rows("flip_probability", labels="soft")} == {0.0}
