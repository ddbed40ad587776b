"""Splits by prompt, counts and warnings, on published files and on synthetic files like them."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spo.data import (
    SPLITS,
    DataError,
    FileSource,
    HHSource,
    PreparedPairs,
    Renderer,
    Row,
    RowError,
    TokenizedPair,
    eval_prompts,
    prepare,
)
from spo.losses import DataNeeds
from spo.notes import collect_notes
from spo.types import LabelledLogps
from tests.data.tokenizers_built_here import build
from tests.fixtures import write_alpaca_like, write_hh_like

TOKENIZER = build("adds_bos")
ROWS = [Row(f"{i // 3}?", f"{i} cat", f"{i} on", where=f"line {i}") for i in range(300)]


def prepared(rows: list[Row], max_length: int = 64, truncation: str = "drop_pair", **options: float) -> PreparedPairs:
    settings = {"seed": 0, "selection": 0.2, "test": 0.3, "min_pairs": 1, **options}
    return prepare(rows, Renderer(TOKENIZER, max_length, truncation), **settings)  # type: ignore[arg-type]


def prompts(result: PreparedPairs) -> dict[str, set[str]]:
    return {split: {pair.prompt_text for pair in getattr(result, split)} for split in SPLITS}


def test_each_prompt_is_in_one_split_and_shares_hold() -> None:
    result = prepared(ROWS)
    sets = prompts(result)
    assert sum(map(len, sets.values())) == len(set.union(*sets.values())) == 100
    # Binomial with n = 100: three standard deviations are 12 and 14 prompts.
    assert abs(len(sets["selection"]) - 20) < 12 and abs(len(sets["test"]) - 30) < 14
    assert result.counts == {
        "read": 300,
        "used": 300,
        "dropped": 0,
        "truncated": 0,
        "boundary_moved": 0,
        **{split: 3 * len(sets[split]) for split in SPLITS},
    }
    assert result.warnings == []


def test_split_depends_on_seed_and_prompt_only() -> None:
    sets = prompts(prepared(ROWS))
    assert prompts(prepared(ROWS[::-1])) == sets
    assert prompts(prepared(ROWS, seed=1)) != sets
    half = prompts(prepared(ROWS[:150]))
    assert all(half[split] <= sets[split] for split in SPLITS)


@pytest.mark.parametrize("seed", range(20))
def test_tiny_data_fills_every_split(seed: int) -> None:
    sets = prompts(prepared(ROWS[:9], seed=seed, selection=0.01, test=0.01))
    assert {split: len(sets[split]) for split in SPLITS} == dict.fromkeys(SPLITS, 1)
    sets = prompts(prepared(ROWS[:9], seed=seed, selection=0.5, test=0.49))
    assert sorted(len(sets[split]) for split in SPLITS) == [1, 1, 1]
    assert prompts(prepared(ROWS[:9], seed=seed, selection=0, test=0))["train"] == {"0?", "1?", "2?"}


def test_splits_of_the_source_are_kept_and_missing_ones_come_from_train() -> None:
    rows = [replace(row, split="test" if i >= 240 else "train") for i, row in enumerate(ROWS)]
    sets = prompts(prepared(rows))
    assert sets["test"] == {f"{i}?" for i in range(80, 100)}
    assert 0 < len(sets["selection"]) < 40 and sets["selection"] | sets["train"] == {f"{i}?" for i in range(80)}
    full = [replace(row, split=SPLITS[i // 3 % 3]) for i, row in enumerate(ROWS)]
    assert prompts(prepared(full)) == {s: {f"{i}?" for i in range(k, 100, 3)} for k, s in enumerate(SPLITS)}


def test_prompt_in_two_source_splits_leaves_train() -> None:
    rows = [*(replace(row, split="train") for row in ROWS), Row("0?", "new", "old", split="test")]
    result = prepared(rows)
    assert prompts(result)["test"] == {"0?"} and [pair.chosen_text for pair in result.test] == ["new"]
    assert "0?" not in prompts(result)["train"] | prompts(result)["selection"]
    assert result.counts["dropped/prompt_in_other_split"] == result.counts["dropped"] == 3


def test_prompts_that_differ_only_in_white_space_are_in_one_split() -> None:
    twins = [replace(row, prompt=f" {row.prompt}", chosen=f"{row.chosen} x") for row in ROWS[:90]]
    with collect_notes() as notes:
        result = prepared(ROWS + twins)
    assert notes == {"notes/similar_prompts": 30.0}
    sets = prompts(result)
    assert all(
        {f" {i}?", f"{i}?"} <= split or not {f" {i}?", f"{i}?"} & split for split in sets.values() for i in range(30)
    )
    assert prompts(prepared(twins + ROWS)) == prompts(prepared(twins[::-1] + ROWS[::-1])) == sets
    # Prompts without such a twin stay where they were.
    alone = {f"{i}?" for i in range(30, 100)}
    assert {split: sets[split] & alone for split in SPLITS} == {
        split: before & alone for split, before in prompts(prepared(ROWS)).items()
    }


def test_white_space_does_not_move_a_prompt_out_of_the_test_split() -> None:
    rows = [*(replace(row, split="train") for row in ROWS), Row("0?\n", "new", "old", split="test")]
    result = prepared(rows)
    assert prompts(result)["test"] == {"0?\n"} and "0?" not in prompts(result)["train"] | prompts(result)["selection"]
    assert result.counts["dropped/prompt_in_other_split"] == 3


def test_drops_are_counted_and_too_many_warn_or_raise() -> None:
    long = [replace(row, chosen="x" * 60) for row in ROWS[:200]]
    result = prepared(long + ROWS[200:], 40)
    assert result.counts["read"] == 300 and result.counts["used"] == 100
    assert result.counts["dropped"] == result.counts["dropped/too_long"] == 200
    (warning,) = result.warnings
    assert "200 of 300 pairs were dropped (too long: 200)" in warning
    assert "data.truncation=trim_completion or data.truncation=trim_prompt" in warning

    cut = prepared(long + ROWS[200:], 40, "trim_completion")
    assert cut.counts["used"] == 300 and cut.counts["truncated"] == 200 and cut.warnings == []
    with pytest.raises(DataError, match=r"only 100 of 300 pairs are left, but data\.min_pairs=101 are needed .*longer"):
        prepared(long + ROWS[200:], 40, min_pairs=101)
    with pytest.raises(DataError, match="only 0 of 200 pairs"):
        prepared(long, 40)
    with pytest.raises(DataError, match="no pair is left for the"):
        prepared(ROWS[:3])
    with pytest.raises(DataError, match="shares must be at least 0 and leave prompts to train"):
        prepared(ROWS, selection=0.5, test=0.5)
    with pytest.raises(RowError, match="does not have a BOS"):
        prepare([Row("", "a", "b")], Renderer(build("no_bos"), 9, "drop_pair"), 0, 0.1, 0.1, 1)


def test_the_limit_of_pairs_may_be_that_of_training_pairs() -> None:
    few = [replace(row, split="train" if i < 30 else "test") for i, row in enumerate(ROWS)]
    few[:12] = [replace(row, chosen=row.chosen + " on" * 40) for row in few[:12]]
    settings: dict[str, Any] = {"selection": 0.0, "training_only": True}
    assert len(prepared(few, 40, min_pairs=18, **settings).train) == 18
    assert len(prepared(few, 40, min_pairs=18, num_pairs=5, **settings).train) == 5
    assert len(prepared(few, 40, selection=0.0, min_pairs=19).train) == 18
    words = r"only 18 of 30 training pairs are left, but data\.min_pairs=19 .* all splits \(too long: 12\).*truncation"
    with pytest.raises(DataError, match=words):
        prepared(few, 40, min_pairs=19, **settings)


def test_rows_that_the_renderer_cannot_use_are_skipped_on_request() -> None:
    bad: list[RowError] = []
    rows = [Row("", "a", "b", where="line 0"), *ROWS]
    counts = prepare(rows, Renderer(build("no_bos"), 64, "drop_pair"), 0, 0.1, 0.1, 1, bad).counts
    assert [error.where for error in bad] == ["line 0"]
    assert (counts["read"], counts["used"], counts["dropped/bad_row"]) == (301, 300, 1)


def test_eval_prompts_are_unique_and_in_a_stable_order() -> None:
    pairs = prepared(ROWS).train
    result = eval_prompts(pairs, "test")
    assert [prompt.prompt_id for prompt in result] == sorted({pair.prompt_id for pair in pairs})
    assert eval_prompts(pairs[::-1], "test") == result
    assert {prompt.split for prompt in result} == {"test"}  # also where the hash of a prompt decides
    by_id = {pair.prompt_id: pair for pair in pairs}
    assert all((p.ids, p.text) == (by_id[p.prompt_id].prompt_ids, by_id[p.prompt_id].prompt_text) for p in result)


# ------------------------------------------------------------------------------------ subsets of the training pairs


def places(pairs: list[TokenizedPair]) -> list[str]:
    return [pair.where for pair in pairs]


def test_subset_of_the_training_pairs_leaves_the_other_splits_whole() -> None:
    whole, few = prepared(ROWS), prepared(ROWS, num_pairs=20, subset_seed=3)
    assert len(few.train) == few.counts["train"] == 20
    assert (few.selection, few.test) == (whole.selection, whole.test)
    assert sorted(places([*few.train, *few.left_out])) == sorted(places(whole.train))
    assert places(few.train) == [place for place in places(whole.train) if place in set(places(few.train))]
    others = len(whole.train) - 20
    assert few.reported_counts == {"read": 300, "used": 300 - others, "left_out": others, "dropped": 0, "truncated": 0}
    assert "left_out" not in whole.reported_counts and not whole.left_out and few.warnings == []
    # The smallest number of pairs is about pairs that were dropped, and none of these was.
    assert len(prepared(ROWS, num_pairs=1, min_pairs=300).train) == 1


def test_subsets_of_a_seed_are_nested_and_uniform() -> None:
    kept: Counter[str] = Counter()
    for seed in range(60):
        subsets = [
            places(prepared(ROWS[:60], selection=0, test=0, num_pairs=n, subset_seed=seed).train) for n in (5, 30)
        ]
        assert set(subsets[0]) < set(subsets[1]) and list(map(len, subsets)) == [5, 30]
        kept.update(subsets[1])
    # Each pair is in half of the 60 subsets: a standard deviation is 3.9.
    assert len(kept) == 60 and all(abs(count - 30) < 4 * 3.9 for count in kept.values())
    first, again, other = (places(prepared(ROWS, num_pairs=30, subset_seed=seed).train) for seed in (1, 1, 2))
    assert first == again != other


def test_subset_does_not_depend_on_the_order_of_rows_or_on_their_labels() -> None:
    turned = [replace(row, chosen=row.rejected, rejected=row.chosen, preference=0.3) for row in ROWS]
    drawn = [set(places(prepared(rows, num_pairs=30).train)) for rows in (ROWS, ROWS[::-1], turned)]
    assert drawn[0] == drawn[1] == drawn[2]
    # Labels of several people for one pair of completions are drawn independently.
    twice = [replace(row, where=f"{row.where} {i}") for row in ROWS[:60] for i in range(2)]
    found = Counter(place.rpartition(" ")[0] for place in places(prepared(twice, num_pairs=20).train))
    assert set(found.values()) >= {1}


def test_subsets_of_labelled_completions_and_of_lists() -> None:
    labelled = [replace(row, rejected=None, label=i % 2) for i, row in enumerate(ROWS)]
    lists = [replace(row, worse=(f"{i} sat",)) for i, row in enumerate(ROWS)]
    for rows in (labelled, lists):
        few = prepared(rows, num_pairs=7)
        assert len(few.train) == 7 and {pair.where for pair in few.train} <= {row.where for row in rows}
    both = prepared(ROWS, num_pairs=7, needs=DataNeeds(LabelledLogps))  # type: ignore[arg-type]
    assert len(both.train) == both.counts["train"] == 14 and len(set(places(both.train))) == 7
    assert both.counts["used"] + both.counts["left_out"] == 300


def test_more_pairs_than_there_are_is_refused() -> None:
    number = len(prepared(ROWS).train)
    assert len(prepared(ROWS, num_pairs=number).train) == number
    words = rf"data\.num_pairs={number + 1}: there are {number} training pairs; set it to {number} or less"
    with pytest.raises(DataError, match=words):
        prepared(ROWS, num_pairs=number + 1)


# ------------------------------------------------------------------------------------ published files, and twins

DATA = Path(os.environ.get("SPO_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def stories_tokenizer() -> PreTrainedTokenizerBase:
    if not DATA.is_dir():
        pytest.skip("no SPO_DATA_DIR")
    return AutoTokenizer.from_pretrained(DATA / "stories260K")


def check(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: str) -> PreparedPairs:
    """Prepare rows, check what must hold for every pair of any file, and return the pairs."""
    result = prepare(rows, Renderer(tokenizer, max_length, truncation), 0, 0.1, 0.1, 32)  # type: ignore[arg-type]
    by_where = {row.where: row for row in rows}
    seen: dict[str, set[str]] = defaultdict(set)
    for split in SPLITS:
        for pair in getattr(result, split):
            seen[pair.prompt_id].add(split)
            for side, ids in zip(("chosen", "rejected"), pair.completions, strict=True):
                assert len(pair.prompt_ids) + len(ids) <= max_length and ids
                if not pair.truncated:
                    row = by_where[pair.where]
                    whole = tokenizer(row.prompt + getattr(row, side), verbose=False)["input_ids"]
                    assert [*pair.prompt_ids, *ids] == [*whole, tokenizer.eos_token_id]
            assert pair.chosen_ids != pair.rejected_ids
            assert [token == tokenizer.bos_token_id for token in pair.prompt_ids].index(True) == 0
            assert tokenizer.bos_token_id not in pair.prompt_ids[1:]
    assert all(len(splits) == 1 for splits in seen.values())
    counts = result.counts
    assert counts["read"] == len(rows) == counts["used"] + counts["dropped"]
    assert counts["dropped"] == sum(n for name, n in counts.items() if name.startswith("dropped/"))
    return result


def test_alpaca_eval_pairs_are_prepared(stories_tokenizer: PreTrainedTokenizerBase) -> None:
    source = FileSource(str(DATA / "alpaca_eval_pairs.train.jsonl.gz"), None, "stop")
    rows = source.rows(lambda prompts, n: [])
    assert source.counts == {"read": 2800, "skipped": 26}
    reasons = Counter(error.reason for error in source.bad_rows)
    assert reasons == {"the completion is empty": 19, "chosen and rejected are equal": 7}
    assert all(0.5 <= row.preference <= 1 for row in rows)  # type: ignore[operator]

    dropped = check(rows, stories_tokenizer, 512, "drop_pair")
    assert 0.12 < dropped.counts["used"] / len(rows) < 0.14
    assert "data.truncation=trim_completion" in dropped.warnings[0]
    trimmed = check(rows[::8], stories_tokenizer, 512, "trim_completion")
    assert trimmed.counts["used"] / len(rows[::8]) > 0.97 and not trimmed.warnings


def test_synthetic_alpaca_pairs_are_prepared(tmp_path: Path) -> None:
    source = FileSource(str(write_alpaca_like(tmp_path / "a.jsonl.gz", 75, seed=0)), None, "stop")
    rows = source.rows(lambda prompts, n: [])
    assert source.counts["read"] == 300 and 0 < source.counts["skipped"] < 10
    # This tokenizer takes about one token for each character, stories260K one for 1.6.
    dropped = check(rows, TOKENIZER, 800, "drop_pair")
    assert 0.08 < dropped.counts["used"] / len(rows) < 0.2 and dropped.warnings
    trimmed = check(rows, TOKENIZER, 800, "trim_completion")
    assert trimmed.counts["used"] / len(rows) > 0.95 and not trimmed.warnings


def test_hh_transcripts_are_prepared(stories_tokenizer: PreTrainedTokenizerBase) -> None:
    source = HHSource(str(DATA / "hh_rlhf_harmless_base.part1.jsonl.gz"), "stop")
    rows = source.rows(lambda prompts, n: [])
    assert source.counts == {"read": 1800, "skipped": 4}
    check_transcripts(source, rows)
    shares = {
        policy: check(rows[::4], stories_tokenizer, 512, policy).counts["used"] / len(rows[::4])
        for policy in ("drop_pair", "trim_completion", "trim_prompt")
    }
    assert 0.66 < shares["drop_pair"] < 0.74
    assert 0.80 < shares["trim_completion"] < 0.88
    assert shares["trim_prompt"] > 0.96


def test_synthetic_hh_transcripts_are_prepared(tmp_path: Path) -> None:
    source = HHSource(str(write_hh_like(tmp_path / "a.jsonl.gz", 200, seed=0)), "stop")
    rows = source.rows(lambda prompts, n: [])
    assert source.counts["read"] == 200 and source.counts["skipped"] < 8
    check_transcripts(source, rows)
    shares = {
        policy: check(rows, TOKENIZER, 800, policy).counts["used"] / len(rows)
        for policy in ("drop_pair", "trim_completion", "trim_prompt")
    }
    assert 0.5 < shares["drop_pair"] < 0.75 < shares["trim_completion"] < 0.9 < shares["trim_prompt"]


def check_transcripts(source: HHSource, rows: list[Row]) -> None:
    """Check that prompt and completions are the published transcripts, cut after the assistant's marker."""
    lines = gzip.decompress(source.path.read_bytes()).decode().split("\n")
    for row in rows:
        record = json.loads(lines[int(row.where.rpartition(" ")[2]) - 1])
        assert (row.prompt + row.chosen, row.prompt + row.rejected) == (record["chosen"], record["rejected"])
        assert row.prompt.startswith("\n\nHuman:") and row.prompt.endswith("\n\nAssistant:")
        # No later turn of the assistant begins where both still agree.
        assert not (row.chosen.find("\n\nAssistant:") >= 0 and row.chosen[:500] == row.rejected[:500])
