"""Needs of a loss that the data has to meet: kinds of rows, numbers of a row, and further completions."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from omegaconf import OmegaConf

from spo.config.checks import check_config
from spo.config.plan import plan
from spo.data import (
    DataError,
    FileSource,
    HHSource,
    HubSource,
    LabelledFileSource,
    PreparedPairs,
    RankedFileSource,
    Renderer,
    Row,
    RowError,
    TokenizedPair,
    prepare,
)
from spo.data.collate import collate
from spo.data.datamodule import pair_tokens
from spo.data.needs import supervised
from spo.data.source import Source
from spo.data.tables import TableSource
from spo.errors import ConfigProblems
from spo.forward.packing import pack
from spo.forward.speed import Speed
from spo.losses import Column, DataNeeds, DPOLoss, Drawn, Feature, LabelledLoss, Mismatched, Role, SFTLoss
from spo.models import FrozenReference
from spo.notes import collect_notes
from spo.objective import score
from spo.records.digests import digest
from spo.stages.pairs import no_completer
from spo.stages.prepare import prepare_run
from spo.stages.train import data_digests
from spo.types import LabelledLogps
from tests.data.tokenizers_built_here import ENDS_IN_EOS, build
from tests.helpers import FAST, PAD, PLAIN, completion_logps, random_pairs, save_model, sequences, tiny_llama

TOKENIZER = build("adds_bos")
PAIR = {"prompt": "What is red?", "chosen": " A rose.", "rejected": " The sky."}
ALONE = {"prompt": "What is red?", "completion": " A rose.", "label": True}
SUPERVISED = DataNeeds.of(SFTLoss())
LABELLED = DataNeeds(LabelledLogps, rejected=False)
Ids = tuple[int, ...]


def write(path: Path, *rows: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read(source: TableSource, needs: DataNeeds | None = None) -> list[Row]:
    if needs is not None:
        source.needs = needs
    return source.rows(no_completer)


def prepared(
    rows: Sequence[Row], needs: DataNeeds, max_length: int = 64, truncation: Any = "drop_pair", **options: Any
) -> PreparedPairs:
    renderer = Renderer(options.pop("tokenizer", TOKENIZER), max_length, truncation)
    settings = {"seed": 0, "selection": 0.0, "test": 0.0, "min_pairs": 1, **options}
    return prepare(rows, renderer, needs=needs, **settings)


# --- completions alone ---------------------------------------------------------------------------------------------


def files(folder: Path, row: Mapping[str, Any]) -> dict[str, TableSource]:
    """Return a source of each kind with one row."""
    path = write(folder / "a.jsonl", row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "b.parquet")
    with (folder / "c.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(row))
        writer.writeheader()
        writer.writerow(row)
    datasets.Dataset.from_list([dict(row)]).to_parquet(folder / "hub" / "train.parquet")
    named = {file: FileSource(str(folder / file), None, "stop") for file in ("a.jsonl", "b.parquet", "c.csv")}
    assert path.is_file()
    return {**named, "hub": HubSource(str(folder / "hub"), None, None, "train", None, "stop")}


def test_rejected_is_optional_for_a_loss_that_does_not_read_it(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    for name, source in files(tmp_path, {"prompt": "Red?", "chosen": " Yes."}).items():
        with pytest.raises(RowError, match="column 'rejected': missing"):
            read(source)
        with pytest.raises(RowError, match="column 'rejected': missing"):
            read(source, LABELLED)
        assert [(row.prompt, row.chosen, row.rejected) for row in read(source, SUPERVISED)] == [
            ("Red?", " Yes.", None)
        ], name


def test_the_prompt_of_a_completion_alone(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="column 'prompt': missing; a row without a rejected completion needs a prompt"):
        read(FileSource(str(write(tmp_path / "a.jsonl", {"chosen": "Red? Yes."})), None, "stop"), SUPERVISED)
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    [row] = read(FileSource(str(write(tmp_path / "b.jsonl", {"chosen": turns})), None, "stop"), SUPERVISED)
    assert (row.prompt, row.chosen) == (tuple(turns[:3]), (turns[3],))
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    [row] = read(HHSource(str(write(tmp_path / "c.jsonl", {"chosen": dialogue})), "stop"), SUPERVISED)
    assert (row.prompt, row.chosen, row.rejected) == (dialogue[:-2], " d", None)


def test_a_mapped_column_must_exist_and_may_be_null(tmp_path: Path) -> None:
    row = {key: PAIR[key] for key in ("prompt", "chosen")}
    source = FileSource(str(write(tmp_path / "a.jsonl", row)), {"rejected": "bad"}, "stop")
    with pytest.raises(RowError, match="column 'bad': missing"):
        read(source, SUPERVISED)
    source = FileSource(str(write(tmp_path / "b.jsonl", {**row, "bad": None})), {"rejected": "bad"}, "stop")
    assert read(source, SUPERVISED)[0].rejected is None


def test_completions_are_alone_in_all_rows_or_in_none() -> None:
    rows = [Row("a?", " b", " c", where="line 1"), Row("d?", " e", where="line 2")]
    with collect_notes() as notes:
        pairs = prepared(rows, SUPERVISED).train
    assert [pair.rejected_ids for pair in pairs] == [None, None] and notes == {"notes/missing_rejected": 1}
    assert collate(pairs, [0, 1], PAD).completions.shape == (1, 2)  # type: ignore[union-attr]
    whole = [rows[0], replace(rows[1], rejected=" f")]
    assert all(pair.rejected_ids for pair in prepared(whole, SUPERVISED).train)
    with pytest.raises(
        RowError, match=r"line 2: column 'rejected': there is no rejected completion, which method.loss"
    ):
        prepared(rows, DataNeeds())
    with pytest.raises(RowError, match=r"line 2: .*neither a label nor a rejected completion"):
        prepared(rows, LABELLED)
    bad: list[RowError] = []
    assert len(prepared(rows, DataNeeds(), bad_rows=bad).train) == 1 and bad[0].where == "line 2"


# --- labels --------------------------------------------------------------------------------------------------------


def test_labelled_rows_of_every_format(tmp_path: Path) -> None:
    rows = [ALONE, {**ALONE, "completion": " The sky.", "label": False}]
    write(tmp_path / "a.jsonl", *rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    with (tmp_path / "c.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(ALONE))
        writer.writeheader()
        writer.writerows(rows)
    for name in ("a.jsonl", "b.parquet", "c.csv"):
        found = read(LabelledFileSource(str(tmp_path / name), None, "stop"))
        assert [(row.prompt, row.chosen, row.rejected, row.label) for row in found] == [
            ("What is red?", " A rose.", None, 1.0),
            ("What is red?", " The sky.", None, 0.0),
        ], name


def test_labelled_rows_with_soft_labels_weights_messages_and_other_names(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    row = {"question": turns[:1], "completion": turns[1:], "good": 0.25, "weight": 2}
    source = LabelledFileSource(str(write(tmp_path / "a.jsonl", row)), {"prompt": "question", "label": "good"}, "stop")
    [found] = read(source)
    assert (found.prompt, found.chosen) == (tuple(turns[:1]), tuple(turns[1:]))
    assert (found.label, found.weight) == (0.25, 2.0)
    tokenizer = build("adds_bos", ENDS_IN_EOS)
    [row_] = prepared([found], LABELLED, tokenizer=tokenizer).train
    assert row_.label == 0.25 and str(tokenizer.decode(list(row_.chosen_ids))).startswith("hello")


@pytest.mark.parametrize(
    ("change", "column", "reason"),
    [
        ({"label": None}, "label", "must be a number, not null"),
        ({"label": "yes"}, "label", "must be a number, not text"),
        ({"label": 2}, "label", "must be between 0 and 1, not 2"),
        ({"label": float("nan")}, "label", "must be between 0 and 1, not nan"),
        ({"weight": -1}, "weight", "must be finite and not negative"),
        ({"weight": 10**400}, "weight", "must be at most 3.4e"),
        ({"completion": 3}, "completion", "must be text or a list of messages"),
        ({"completion": [{"role": "user", "content": "a"}]}, "completion", "the last message must be the"),
    ],
)
def test_bad_labelled_rows_are_named(change: dict[str, Any], column: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ALONE, {**ALONE, "completion": " Blood.", **change})
    with pytest.raises(RowError) as error:
        read(LabelledFileSource(str(path), None, "stop"))
    assert str(error.value).startswith(f"{path}, line 2: column {column!r}") and reason in str(error.value)
    source = LabelledFileSource(str(path), None, "skip")
    assert len(read(source)) == 1 and source.counts == {"read": 2, "skipped": 1}


@pytest.mark.parametrize("missing", ["prompt", "completion", "label"])
def test_labelled_rows_need_their_columns(missing: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {key: value for key, value in ALONE.items() if key != missing})
    with pytest.raises(RowError, match=f"column '{missing}': missing"):
        read(LabelledFileSource(str(path), None, "stop"))


def test_findings_of_labelled_rows(tmp_path: Path) -> None:
    rows = [ALONE, ALONE, {**ALONE, "label": False}, {**ALONE, "completion": " ", "label": False}]
    source = LabelledFileSource(str(write(tmp_path / "a.jsonl", *rows)), None, "stop")
    assert len(read(source)) == 3 and "the completion is empty" in str(source.bad_rows[0])
    assert source.findings.counts == {"repeated_rows": 1, "contradicting_labels": 1}


PAIRS = [Row(f"{i}?", f" {i} yes", f" {i} no", where=f"line {i}") for i in range(20)]


def test_a_pair_is_two_labelled_rows_in_one_split() -> None:
    rows = [replace(row, preference=0.75, weight=2.0) if i % 2 else row for i, row in enumerate(PAIRS)]
    both = prepared(rows, LABELLED, selection=0.3, test=0.3)
    pairs = prepared(rows, DataNeeds(), selection=0.3, test=0.3)
    for split in ("train", "selection", "test"):
        labelled, whole = getattr(both, split), getattr(pairs, split)
        assert len(labelled) == 2 * len(whole) > 0
        for good, bad, pair in zip(labelled[::2], labelled[1::2], whole, strict=True):
            p = 1.0 if pair.preference is None else pair.preference
            assert (good.chosen_ids, good.chosen_text, good.label) == (pair.chosen_ids, pair.chosen_text, p)
            assert (bad.chosen_ids, bad.chosen_text, bad.label) == (pair.rejected_ids, pair.rejected_text, 1 - p)
            for one in (good, bad):
                assert (one.prompt_id, one.prompt_ids, one.weight) == (pair.prompt_id, pair.prompt_ids, pair.weight)
                assert one.rejected_ids is None and one.preference is None
    assert {key: n for key, n in both.counts.items() if key in ("read", "used")} == {"read": 20, "used": 20}
    assert both.counts["train"] == len(both.train) == 2 * pairs.counts["train"]
    with pytest.raises(DataError, match=r"only 20 of 20 pairs are left, but data.min_pairs=21"):
        prepared(rows, LABELLED, min_pairs=21)


def test_labels_reach_a_batch_and_other_losses_refuse_them() -> None:
    rows = [Row("a?", " b", label=1.0, where="line 1"), Row("a?", " c", label=0.25, weight=3.0, where="line 2")]
    pairs = prepared(rows, LABELLED).train
    batch = collate(pairs, [0, 1], PAD)
    assert batch.label is not None and batch.label.tolist() == [1.0, 0.25] and batch.weight is not None
    logps = LabelledLogps.of_batch(batch, torch.tensor([-1.0, -2.0]), None)
    assert logps.policy.tolist() == [-1.0, -2.0] and logps.label.tolist() == [1.0, 0.25]
    assert batch.weight.tolist() == [1.0, 3.0] and batch.preference is None
    for needs in (DataNeeds(), SUPERVISED):
        with pytest.raises(RowError, match=r"line 1: .*method.loss does not read labels"):
            prepared(rows, needs)


def test_fine_tuning_learns_from_desirable_completions_alone() -> None:
    rows = [Row("a", "b", "c"), Row("a", "d", label=0.5), Row("a", "e", label=0.6), Row("a", "f", label=0.0)]
    assert [(row.chosen, row.rejected, row.label) for row in supervised(rows)] == [("b", None, None), ("e", None, None)]
    with pytest.raises(DataError, match=r"no completion has a label above 0.5"):
        supervised(rows[1:2])


# --- numbers of a row ----------------------------------------------------------------------------------------------

FEATURES = {
    "flip": Feature("flip_probability", default=0.25),
    "reward": Feature(("reward_chosen", "reward_rejected")),
    "embedding": Feature("embedding", size=3),
}
NUMBERS = {"reward_chosen": 1, "reward_rejected": -0.5, "embedding": [1, 2, 3.5]}
READS_NUMBERS = DataNeeds(features=FEATURES)


def numbers_of(source: TableSource, needs: DataNeeds = READS_NUMBERS, **options: Any) -> PreparedPairs:
    return prepared(read(source, needs), needs, name_of=source.column_name, **options)


def test_features_reach_a_batch(tmp_path: Path) -> None:
    rows = [{**PAIR, **NUMBERS}, {**PAIR, **NUMBERS, "prompt": "And?", "flip_probability": 0.5, "reward_chosen": 2.5}]
    pairs = numbers_of(FileSource(str(write(tmp_path / "a.jsonl", *rows)), None, "stop")).train
    batch = collate(pairs, [0, 1], PAD)
    assert {name: values.tolist() for name, values in batch.features.items()} == {
        "flip": [0.25, 0.5],
        "reward": [[1.0, -0.5], [2.5, -0.5]],
        "embedding": [[1.0, 2.0, 3.5]] * 2,
    }
    assert {values.dtype for values in batch.features.values()} == {torch.float32}
    alone = prepared(read(FileSource(str(tmp_path / "a.jsonl"), None, "stop")), DataNeeds()).train
    assert [pair.features for pair in alone] == [{}, {}]


def test_features_of_every_format(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    for name, source in files(tmp_path, {**PAIR, **NUMBERS}).items():
        [pair] = numbers_of(source).train
        assert pair.features == {"flip": 0.25, "embedding": (1.0, 2.0, 3.5)}, name
        assert pair.numbers == {"reward": (1.0, -0.5)}, name


def test_feature_columns_may_have_other_names(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", {**PAIR, **NUMBERS, "flips": 0.1}))
    source = FileSource(path, {"flip_probability": "flips"}, "stop")
    assert numbers_of(source).train[0].features["flip"] == 0.1
    with pytest.raises(DataError, match=r"unknown \['flip_probability'\]; choose from prompt, .*weight"):
        read(source, DataNeeds())
    # A column that was named must exist, even if the feature has a default.
    with pytest.raises(RowError, match="line 1: column 'nowhere': missing"):
        numbers_of(FileSource(path, {"flip_probability": "nowhere"}, "stop"))
    with pytest.raises(RowError, match="column 'good': must be a number, not text"):
        path = str(write(tmp_path / "b.jsonl", {**PAIR, **NUMBERS, "good": "high"}))
        numbers_of(FileSource(path, {"reward_chosen": "good"}, "stop"))


@pytest.mark.parametrize(
    ("change", "column", "reason"),
    [
        ({"reward_chosen": None}, "reward_chosen", "missing; method.loss reads it as the feature 'reward'"),
        ({"reward_rejected": "1"}, "reward_rejected", "must be a number, not text"),
        ({"reward_rejected": True}, "reward_rejected", "must be a number, not true or false"),
        ({"reward_rejected": [1]}, "reward_rejected", "must be a number, not a list"),
        ({"flip_probability": float("nan")}, "flip_probability", "must be finite, not nan"),
        ({"flip_probability": float("-inf")}, "flip_probability", "must be finite, not -inf"),
        ({"flip_probability": 1e39}, "flip_probability", "must be at most 3.4e"),
        (
            {"flip_probability": 2**24 + 1},
            "flip_probability",
            "float32, in which a loss reads it, would round 16777217",
        ),
        ({"embedding": [1, 2**60 + 1, 2]}, "embedding", "float32, in which a loss reads it, would round"),
        ({"embedding": [1, 2]}, "embedding", "must have 3 numbers, not 2"),
        ({"embedding": [1, 2, "x"]}, "embedding", "must be a number, not text"),
        ({"embedding": [1, 2, float("inf")]}, "embedding", "must be finite, not inf"),
        ({"embedding": 1}, "embedding", "must be a list of 3 numbers, not a number"),
        ({"embedding": None}, "embedding", "missing"),
    ],
)
def test_bad_numbers_are_named(change: dict[str, Any], column: str, reason: str, tmp_path: Path) -> None:
    rows = [{**PAIR, **NUMBERS}, {**PAIR, **NUMBERS, "prompt": "And?", **change}]
    source = FileSource(str(write(tmp_path / "a.jsonl", *rows)), None, "stop")
    with pytest.raises(RowError) as error:
        numbers_of(source)
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}, line 2: column {column!r}: {reason}")
    bad: list[RowError] = []
    result = numbers_of(source, bad_rows=bad)
    assert len(result.train) == 1 and result.counts["dropped/bad_row"] == 1 and bad[0].column == column


# --- further completions -------------------------------------------------------------------------------------------


def with_roles(**roles: Role) -> DataNeeds:
    return DataNeeds(extra_completions=roles)


def test_a_text_column_is_a_completion_of_the_prompt(tmp_path: Path) -> None:
    rows = [
        {**PAIR, "anchor": " Rust."},
        {**PAIR, "prompt": "Is blood red, too?", "anchor": "Is blood red, too? Yes."},  # repeats the prompt
    ]
    needs = with_roles(target=Column("anchor"))
    pairs = prepared(read(FileSource(str(write(tmp_path / "a.jsonl", *rows)), None, "stop"), needs), needs).train
    renderer = Renderer(TOKENIZER, 64, "drop_pair")
    for pair, text in zip(pairs, (" Rust.", " Yes."), strict=True):
        alone = renderer.render(Row(pair.prompt_text, text))
        assert isinstance(alone, TokenizedPair)
        assert pair.prompt_ids + pair.extra["target"] == alone.prompt_ids + alone.chosen_ids
        assert pair.extra["target"][-1] == TOKENIZER.eos_token_id and list(pair.extra) == ["target"]


def test_a_text_column_of_whole_texts_and_of_conversations(tmp_path: Path) -> None:
    needs = with_roles(target=Column("anchor"))
    whole = {"chosen": "Red? Yes, red.", "rejected": "Red? No, blue.", "anchor": "Red? Perhaps."}
    [row] = read(FileSource(str(write(tmp_path / "a.jsonl", whole)), None, "stop"), needs)
    assert (row.prompt, row.chosen, row.columns) == ("Red?", " Yes, red.", {"anchor": " Perhaps."})
    with pytest.raises(RowError, match="column 'anchor': does not begin with the prompt that chosen and rejected"):
        read(FileSource(str(write(tmp_path / "b.jsonl", {**whole, "anchor": " Perhaps."})), None, "stop"), needs)
    user, one, two, three = (
        {"role": r, "content": c} for r, c in zip(["user", *["assistant"] * 3], "abcd", strict=True)
    )
    turns = {"prompt": [user], "chosen": [one], "rejected": [two], "anchor": [user, three]}
    source = FileSource(str(write(tmp_path / "c.jsonl", turns)), None, "stop")
    tokenizer = build("adds_bos", ENDS_IN_EOS)
    [pair] = prepared(read(source, needs), needs, tokenizer=tokenizer).train
    assert tokenizer.decode(list(pair.extra["target"])) == str(tokenizer.decode(list(pair.chosen_ids))).replace(
        "b", "d"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"anchor": None}, "must be text or a list of messages, not null"),
        ({"anchor": "  "}, "the completion is empty"),
        ({"anchor": 3}, "must be text or a list of messages, not a number"),
        ({"anchor": [{"role": "assistant", "content": "a"}]}, "is a list of messages, but the prompt is text"),
    ],
)
def test_bad_text_columns_are_named(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    rows = [{**PAIR, "anchor": " a"}, {**PAIR, "prompt": "And?", **change}]
    needs, path = with_roles(target=Column("anchor")), write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(RowError) as error:
        read(FileSource(str(path), None, "stop"), needs)
    assert str(error.value).startswith(f"{path}, line 2: column 'anchor': ") and reason in str(error.value)
    assert len(read(FileSource(str(path), None, "skip"), needs)) == 1
    with pytest.raises(RowError, match="column 'target_text': missing"):
        read(FileSource(str(path), {"anchor": "target_text"}, "stop"), needs)


def test_columns_of_other_sources_are_checked() -> None:
    needs = with_roles(target=Column("anchor"))
    cases: list[tuple[dict[str, Any], str]] = [({}, "missing; method.loss"), ({"anchor": []}, "in the form of the")]
    for columns, reason in cases:
        with pytest.raises(RowError, match=f"line 1: column 'theirs': .*{reason}"):
            prepared([Row("a?", " b", " c", where="line 1", columns=columns)], needs, name_of=lambda name: "theirs")


MISMATCHED = with_roles(other=Mismatched())


def test_mismatched_completions_are_those_of_the_row_before() -> None:
    pairs = prepared(PAIRS, MISMATCHED).train
    chosen = [pair.chosen_ids for pair in pairs]
    assert [pair.extra["other"] for pair in pairs] == chosen[-1:] + chosen[:-1]


def test_mismatched_completions_of_pairs_are_as_often_chosen_as_rejected() -> None:
    rows = [Row(f"{i}?", f" {i} yes", f" {i} no") for i in range(12)]
    train = prepared(rows, replace(LABELLED, extra_completions={"other": Mismatched()})).train
    label_of = {row.chosen_ids: row.label for row in train}
    assert {label_of[row.extra["other"]] for row in train} == {0.0, 1.0}
    assert sorted(row.extra["other"] for row in train) == sorted(row.chosen_ids for row in train)


@pytest.mark.parametrize("needs", [MISMATCHED, replace(LABELLED, extra_completions={"other": Mismatched()})])
def test_mismatched_completions_have_another_prompt(needs: DataNeeds) -> None:
    rows = [Row(f"{i // 3 % 16}?", f" {i} yes", f" {i} no") for i in range(96)]  # runs of three, and a circle
    result = prepared(rows, needs, selection=0.25, test=0.25)
    for split in ("train", "selection", "test"):
        pairs = getattr(result, split)
        prompt_of = {ids: pair.prompt_id for pair in pairs for ids in pair.completions}
        # The completion is one of the same split.
        assert pairs and all(prompt_of[pair.extra["other"]] != pair.prompt_id for pair in pairs)


def test_roles_that_cannot_be_made_name_the_loss() -> None:
    same = [Row("a?", " b", " c"), Row("a?", " d", " e")]
    with pytest.raises(DataError, match=r"method.loss: .*'other' of the train split: mismatched completions need rows"):
        prepared(same, MISMATCHED)
    with pytest.raises(DataError, match="'anchor' of the train split: it is drawn from the reference model"):
        prepared(PAIRS, with_roles(anchor=Drawn()))

    @dataclass(frozen=True)
    class Broken(Role):
        result: Any = ()

        def tokens(self, rows: Any) -> Any:
            return rows.column("b") if self.result == "column" else self.result

    for broken in (Broken([(3,)]), Broken([()] * len(PAIRS))):
        with pytest.raises(DataError, match=r"'x' of the train split: tokens\(\) must return the tokens"):
            prepared(PAIRS, with_roles(x=broken))
    with pytest.raises(DataError, match="'x' of the train split: it reads the column 'b', but its text_columns"):
        prepared(PAIRS, with_roles(x=Broken("column")))


def test_one_completion_is_drawn_for_each_prompt_of_a_split() -> None:
    asked: list[list[Ids]] = []

    def draw(prompts: Sequence[Ids], stop_ids: Sequence[int]) -> list[Ids]:
        assert TOKENIZER.eos_token_id in stop_ids
        asked.append(list(prompts))
        return [(*prompt[-2:], 7) for prompt in prompts]

    rows = [Row(f"{i // 2}?", f" {i} yes", f" {i} no") for i in range(20)]
    result = prepared(rows, with_roles(anchor=Drawn()), draw=draw, selection=0.3, test=0.3)
    assert (
        [len(set(one)) for one in asked]
        == [len(one) for one in asked]
        == [n // 2 for n in (len(result.train), len(result.selection), len(result.test))]
    )
    for pair in result.train + result.selection + result.test:
        assert pair.extra["anchor"] == (*pair.prompt_ids[-2:], 7)


@pytest.mark.parametrize("truncation", ["drop_pair", "trim_completion", "trim_prompt"])
def test_length_limits_cover_further_completions(truncation: str) -> None:
    long = Row("aaaa", " b" * 10, " c")
    rows = [Row("dd", " e", " f"), long, Row("g", " h", " i")]
    longest = max(len(p.prompt_ids) + max(map(len, p.completions)) for p in prepared(rows, DataNeeds()).train)
    # The long completion fits its own prompt, and the prompt of the row after it is longer by a few tokens.
    rows[2] = Row("g" * 8, " h", " i")
    whole = prepared(rows, MISMATCHED, 99).train[2]
    assert len(whole.prompt_ids) + len(whole.extra["other"]) > longest
    result = prepared(rows, MISMATCHED, longest, truncation)
    assert all(len(p.prompt_ids) + max(map(len, p.sequences)) <= longest for p in result.train)
    if truncation == "drop_pair":
        assert len(result.train) == 2 and result.counts["dropped/too_long"] == 1 and result.counts["used"] == 2
        # A pair that is read as two rows is dropped as a whole.
        rows[1] = Row("aaaa", " c", " b" * 10)
        both = prepared(rows, replace(LABELLED, extra_completions={"other": Mismatched()}), longest, truncation)
        assert both.counts["used"] == 2 and len(both.train) == 4
        return
    last = result.train[2]
    assert len(result.train) == 3 and last.truncated and not result.train[0].truncated
    room = longest - len(whole.prompt_ids)
    expected = whole.extra["other"][:room] if truncation == "trim_completion" else whole.extra["other"]
    assert last.extra["other"] == expected and last.completions == whole.completions


def test_length_limits_cover_text_columns() -> None:
    rows = [replace(row, columns={"anchor": " a" * 30}) for row in PAIRS[:3]]
    with pytest.raises(DataError, match="only 0 of 3 pairs are left"):
        prepared(rows, with_roles(target=Column("anchor")), 20)
    for pair in prepared(rows, with_roles(target=Column("anchor")), 20, "trim_completion").train:
        assert len(pair.prompt_ids) + len(pair.extra["target"]) == 20 and pair.truncated


# --- batches -------------------------------------------------------------------------------------------------------


def pair(i: int, extra: Ids, **changes: Any) -> TokenizedPair:
    made = TokenizedPair((1, 10 + i // 2), (50 + i, 2), (90 + i, 60, 2), "", "", "", f"{i}", extra={"other": extra})
    return replace(made, **changes)


BATCH = [pair(0, (70, 2)), pair(1, (50, 2)), pair(2, (71, 72, 73, 2)), pair(3, (93, 60, 2))]


@pytest.mark.parametrize("packed", [False, True])
def test_further_completions_are_sequences_once(packed: bool) -> None:
    arrange = partial(pack, share_prompts=True) if packed else lambda sequences: sequences
    batch = collate(BATCH, range(4), PAD, arrange=arrange)
    completions = batch.sequences.completions()
    assert [completions[i] for i in batch.extra["other"].tolist()] == [list(pair.extra["other"]) for pair in BATCH]
    # The completion of pair 1 is the chosen one of pair 0, and that of pair 3 is its own rejected one.
    assert len(batch.sequences) == 10 and batch.extra["other"].tolist() == [8, 0, 9, 7]
    assert batch.completions is not None and batch.completions.shape == (2, 4) and len(batch.keys or []) == 10
    if packed:  # the two prompts are computed once
        assert batch.sequences.packed is not None
        assert batch.sequences.packed.input_ids.numel() == 2 * 2 + sum(map(len, completions))


@pytest.mark.parametrize("settings", [PLAIN, FAST])
def test_a_loss_gets_further_completions_packed_and_padded(settings: Speed) -> None:
    """Values equal those of each sequence by itself, with gradient as declared."""
    policy, reference = tiny_llama(0), tiny_llama(1)
    names = {"other": Mismatched(), "target": Column("a", gradient=True)}
    rows = shared_prompts(6)
    loss = DPOLoss(0.0)
    loss.extra_completions = names
    speed = settings.resolve_for(policy, reference)
    batch = collate(rows, range(len(rows)), PAD, arrange=speed.arrange)
    assert (batch.sequences.packed is not None) == settings.packing
    found = score(batch, loss, policy, attached(reference), speed, {}).inputs_of(loss).extra
    for name in names:
        alone = sequences([(row.prompt_ids, row.extra[name]) for row in rows])
        expected = [completion_logps(model, alone) for model in (policy, reference)]
        torch.testing.assert_close(found[name].policy, expected[0])
        torch.testing.assert_close(found[name].reference, expected[1].detach())
        assert found[name].length.tolist() == [len(row.extra[name]) for row in rows]
        assert found[name].policy.requires_grad == (name == "target")


def shared_prompts(count: int) -> list[TokenizedPair]:
    """Return pairs of the small model's vocabulary, two of each prompt, with two further completions."""
    made = random_pairs(count, seed=5)
    prompts = [made[i - i % 2].prompt_ids for i in range(count)]
    extra = [{"other": made[i - 1].chosen_ids, "target": (3, i + 4, 2)} for i in range(count)]
    return [replace(made[i], prompt_ids=prompts[i], extra=extra[i]) for i in range(count)]


def attached(model: Any) -> FrozenReference:
    reference = FrozenReference()
    reference.attach(lambda: model)
    return reference


def test_token_counts_cover_further_completions() -> None:
    assert pair_tokens(BATCH[0], share_prompts=True) == 2 + 2 + 3 + 2
    assert pair_tokens(BATCH[0], share_prompts=False) == 3 * 2 + 2 + 3 + 2
    assert pair_tokens(BATCH[3], share_prompts=True) == 2 + 2 + 3  # its own rejected completion


# --- identity ------------------------------------------------------------------------------------------------------


def test_digest_of_the_pairs_does_not_depend_on_what_a_loss_reads(tmp_path: Path) -> None:
    rows = [{**PAIR, **NUMBERS}, {**PAIR, **NUMBERS, "prompt": "And?"}]
    source = FileSource(str(write(tmp_path / "a.jsonl", *rows)), None, "stop")
    plain, features = data_digests(numbers_of(source, DataNeeds())), data_digests(numbers_of(source))
    labelled = data_digests(numbers_of(source, LABELLED))
    assert plain.keys() == {"pairs_sha256"}
    assert plain["pairs_sha256"] == features["pairs_sha256"] == labelled["pairs_sha256"]
    assert len({features["loss_rows_sha256"], labelled["loss_rows_sha256"], plain["pairs_sha256"]}) == 3
    other = FileSource(str(write(tmp_path / "b.jsonl", *rows[:1])), None, "stop")
    assert data_digests(numbers_of(other))["pairs_sha256"] != plain["pairs_sha256"]


def test_digests_of_data_without_new_fields_are_those_of_before() -> None:
    plain = replace(BATCH[0], extra={})
    assert digest(plain.identity()) == digest(dataclasses.astuple(plain)[:-4])
    changes: list[dict[str, Any]] = [
        {},
        {"label": 0.0},
        {"label": 1.0},
        {"features": {"a": 0.0}},
        {"features": {"a": 1.0}},
        {"features": {"b": 1.0}},
        {"numbers": {"c": (1.0, 0.0)}},
        {"numbers": {"c": (0.0, 1.0)}},
        {"extra": {"a": (3,)}},
        {"extra": {"a": (4,)}},
        {"extra": {"b": (4,)}},
    ]
    assert len({digest(replace(plain, **change).identity()) for change in changes}) == len(changes)


# --- compositions --------------------------------------------------------------------------------------------------


class Rewarded(DPOLoss):
    features: Mapping[str, Feature] = {"reward": Feature("reward")}


class PerCompletion(DPOLoss):
    features: Mapping[str, Feature] = {"reward": Feature(("a", "b"))}


class Anchored(DPOLoss):
    extra_completions: Mapping[str, Role] = {"target": Column("anchor")}


class Unpaired(LabelledLoss):
    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def of_labels(self, logps: LabelledLogps, *, alpha: float, beta: float) -> torch.Tensor:
        return -logps.policy * logps.label


class UnpairedPerCompletion(Unpaired):
    features: Mapping[str, Feature] = {"reward": Feature(("a", "b"))}


def method(loss: type) -> list[str]:
    return [f"method.loss._target_={__name__}.{loss.__qualname__}"]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["data=labelled_jsonl", "method=dpo"], "method=dpo reads pairs of completions without labels, but each row of "
         "data=labelled_jsonl is a single completion"),
        (["data=labelled_jsonl", "method=spo_ranked"], "method=spo_ranked reads lists of completions without labels"),
        (["data=labelled_jsonl", "method=sft"], "method=sft reads completions without labels"),
        (["data=ranked_jsonl", *method(Unpaired)], "single completions with labels, but data=ranked_jsonl has lists"),
        (["data=labelled_jsonl", *method(UnpairedPerCompletion)], "the feature 'reward' is a number of each "
         "completion of a pair, and data=labelled_jsonl has single completions"),
        (["data=stories", *method(Rewarded)], "reads the column reward, but data=stories does not have such columns"),
        (["data=stories", *method(PerCompletion)], "reads the columns a, b, but data=stories"),
        (["data=enumerable", *method(Anchored)], "reads the column anchor, but data=enumerable does not have"),
        (["data=jsonl", "data.source.columns={reward: r}", "method=dpo"], r"data.source.columns: unknown ['reward']"),
    ],
)  # fmt: skip
def test_impossible_compositions_are_refused_before_anything_loads(
    words: list[str], found: str, tmp_path: Path
) -> None:
    path = [] if words[0] in ("data=stories", "data=enumerable") else [f"data.path={write(tmp_path / 'a.jsonl', PAIR)}"]
    with pytest.raises(ConfigProblems) as error:
        plan(["method=dpo", *words, *path] if not any(w.startswith("method=") for w in words) else [*words, *path])
    assert found in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["data=jsonl", "method=dpo", *method(Rewarded), "data.source.columns={reward: r}"],
        ["data=jsonl", "method=dpo", *method(Anchored)],
        ["data=jsonl", "method=dpo", *method(Unpaired)],
        ["data=jsonl", "method=dpo", *method(UnpairedPerCompletion)],
        ["data=labelled_jsonl", "method=dpo", *method(Unpaired)],
        ["data=stories", "method=dpo", *method(Unpaired)],
        ["data=jsonl", "method=sft"],
        ["data=ranked_jsonl", "method=sft"],
    ],
)
def test_possible_compositions_pass(words: list[str], tmp_path: Path) -> None:
    path = [] if "data=stories" in words else [f"data.path={write(tmp_path / 'a.jsonl', PAIR)}"]
    assert plan([*words, *path]).jobs


def test_declarations_of_sources() -> None:
    assert not Source.yields_labels and not Source.has_columns
    for source in (FileSource, HHSource, HubSource, RankedFileSource, LabelledFileSource):
        assert source.has_columns and source.yields_labels == (source is LabelledFileSource)


# --- the stage before training -------------------------------------------------------------------------------------


class DrawnTarget(DPOLoss):
    extra_completions: Mapping[str, Role] = {"anchor": Drawn()}


class Random(DPOLoss):
    """A loss that draws numbers when it is built, as a trained head does."""

    def __init__(self, label_smoothing: float) -> None:
        super().__init__(label_smoothing)
        self.number = float(torch.rand(()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def of_run(folder: Path, model: Path, rows: Sequence[Mapping[str, Any]], *words: str) -> PreparedPairs:
    """Return the pairs of a run that passes its checks."""
    path = write(folder / "rows.jsonl", *rows)
    common = [
        "model=hf",
        f"model.path={model}",
        f"data.path={path}",
        "data.min_pairs=1",
        "data.max_new_tokens=6",
        f"paths.cache={folder / 'cache'}",
        "trainer.accelerator=cpu",
    ]
    [job] = plan(["data.max_length=32", *common, *words]).jobs
    check_config(job.cfg)
    torch.manual_seed(3)
    return prepare_run(OmegaConf.create(OmegaConf.to_container(job.cfg, resolve=True))).pairs  # type: ignore[arg-type]


def words(*ids: int) -> str:
    return "".join(f" w{i}" for i in ids)


ROWS = [{"prompt": f"w{3 + i}", "chosen": words(4 + i), "rejected": words(5, 3 + i)} for i in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize("some", [False, True])
def test_a_run_of_sft_needs_no_rejected_completions(some: bool, tmp_path: Path, model: Path) -> None:
    alone = [{key: row[key] for key in ("prompt", "chosen")} for row in ROWS]
    rows = [*ROWS[:5], *alone[5:]] if some else alone
    pairs = of_run(tmp_path, model, rows, "data=jsonl", "method=sft", "reference=none")
    assert pairs.counts["used"] == 12
    assert all(pair.rejected_ids is None for pair in pairs.train + pairs.selection + pairs.test)
    with pytest.raises(RowError, match="column 'rejected': missing"):
        of_run(tmp_path, model, rows, "data=jsonl", "method=dpo")


@pytest.mark.slow
def test_a_run_with_labelled_data(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(ROWS)]
    pairs = of_run(tmp_path, model, rows, "data=labelled_jsonl", "method=dpo", *method(Unpaired))
    labels = {pair.prompt_text: pair.label for pair in pairs.train + pairs.selection + pairs.test}
    assert labels == {row["prompt"]: row["label"] for row in rows}


@pytest.mark.slow
def test_drawn_completions_are_cached_and_depend_on_seed_and_prompt_alone(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("data=jsonl", "method=dpo", *method(DrawnTarget))

    def anchors(rows: Sequence[Mapping[str, Any]], *more: str) -> dict[str, Ids]:
        pairs = of_run(tmp_path, model, rows, *run, *more)
        return {pair.prompt_text: pair.extra["anchor"] for pair in pairs.train + pairs.selection + pairs.test}

    drawn = anchors(ROWS)
    assert len(drawn) == 12 and len(set(drawn.values())) > 6
    assert {len(ids) for ids in drawn.values()} <= set(range(1, 7))
    fewer = anchors(ROWS[:9])
    assert fewer == {prompt: drawn[prompt] for prompt in fewer} and len(fewer) == 9
    assert anchors(ROWS, "data.seed=1") != drawn
    entries = len([*(tmp_path / "cache").glob("completions_of_reference/*/manifest.json")])
    monkeypatch.setattr("spo.stages.pairs.sample", None)  # everything is found in the cache
    assert anchors(ROWS) == drawn and anchors(ROWS, "seed=5") == drawn
    assert len([*(tmp_path / "cache").glob("completions_of_reference/*/manifest.json")]) == entries


@pytest.mark.slow
def test_drawn_completions_fit_the_length_limit(tmp_path: Path, model: Path) -> None:
    rows = [*ROWS, {"prompt": "w3" + words(*range(4, 22)), "chosen": " w3", "rejected": " w4"}]
    result = of_run(tmp_path, model, rows, "data=jsonl", "method=dpo", *method(DrawnTarget), "data.max_length=22")
    pairs = result.train + result.selection + result.test
    [long] = [pair for pair in pairs if len(pair.prompt_ids) == 20]
    assert 1 <= len(long.extra["anchor"]) <= 2 and result.counts["used"] == 13
    assert all(len(pair.prompt_ids) + max(map(len, pair.sequences)) <= 22 for pair in pairs)


@pytest.mark.slow
def test_reading_the_needs_of_a_loss_leaves_random_numbers_alone(tmp_path: Path, model: Path) -> None:
    def number_after(loss: type) -> float:
        of_run(tmp_path, model, ROWS, "data=jsonl", "method=dpo", *method(loss))
        return float(torch.rand(()))

    assert number_after(Random) == number_after(DPOLoss)
