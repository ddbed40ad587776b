"""Data sources: TRL's formats, and malformed and damaged files."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from spo.data import DataError, FileSource, HHSource, HubSource, NoPreference, Row, RowError
from spo.data.prompts import shared_prompt_length
from spo.data.tables import TableSource

GOOD = {"prompt": "What is red?", "chosen": " A rose.", "rejected": " The sky."}
USER, HELLO, BYE = (
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "assistant", "content": "bye"},
)


def load(source: TableSource) -> list[Row]:
    def never(prompts: Any, n: int) -> Any:
        raise AssertionError("a file brings its own completions")

    return source.rows(never)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def read(path: Path, on_bad_row: str = "stop", columns: dict[str, str] | None = None) -> list[Row]:
    return load(FileSource(str(path), columns, on_bad_row))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- formats


def test_row_has_prompt_preference_and_weight(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {**GOOD, "preference": 0.75, "weight": 2, "source": "me"}, "", GOOD)
    first, second = read(path)
    assert first == Row("What is red?", " A rose.", " The sky.", 0.75, 2.0, None, f"{path}, line 1")
    assert (second.preference, second.weight, second.where) == (None, None, f"{path}, line 3")


def test_all_file_formats_and_folders_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{**GOOD, "prompt": f'{i}, "é"\n?', "preference": 0.5 + i / 10} for i in range(3)]
    jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "notes.txt").write_text("not data")

    def content(path: Path) -> list[tuple[Any, ...]]:
        return [(row.prompt, row.chosen, row.rejected, row.preference) for row in read(path)]

    expected = [(row["prompt"], row["chosen"], row["rejected"], row["preference"]) for row in rows]
    names = ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.csv")
    assert {name: content(tmp_path / name) for name in names} == dict.fromkeys(names, expected)
    assert content(tmp_path) == expected * 4
    # A record of two lines begins where its first line stands.
    assert [row.where for row in read(tmp_path / "d.csv")] == [f"{tmp_path / 'd.csv'}, line {n}" for n in (2, 4, 6)]


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "q", "good": "a", "bad": "b", "prompt": "not this"})
    (row,) = read(path, columns={"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert (row.prompt, row.chosen, row.rejected) == ("q", "a", "b")
    with pytest.raises(RowError, match="line 1: column 'p': missing; the row has question, good, bad, prompt"):
        read(path, columns={"prompt": "p", "chosen": "good", "rejected": "bad"})
    with pytest.raises(DataError, match=r"unknown \['reply'\]"):
        read(path, columns={"reply": "good"})


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("Q: why?\nA: because", "Q: why?\nA: before", "Q: why?\nA:"),
        ("one\ntwo", "one\nthree", "one\n"),
        ("a b", "a b c", "a"),
        ("a b c", "a b", "a"),
        ("word", "work", ""),
        ("Q A", "Q\nB", "Q"),
        ("  x", "  y", " "),
        ("x", "y", ""),
    ],
)
def test_shared_prompt_does_not_split_a_word(chosen: str, rejected: str, prompt: str) -> None:
    cut = shared_prompt_length(chosen, rejected)
    assert chosen[:cut] == rejected[:cut] == prompt
    assert chosen[cut:] and rejected[cut:]


def test_shared_beginning_becomes_the_prompt(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"chosen": "The sky is blue.", "rejected": "The sky is green."})
    (row,) = read(path)
    assert (row.prompt, row.chosen, row.rejected) == ("The sky is", " blue.", " green.")


def test_conversations_may_have_or_lack_a_prompt(tmp_path: Path) -> None:
    turns = [USER, HELLO, {"role": "user", "content": "again"}]
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": turns, "chosen": [HELLO], "rejected": [BYE]},
        {"chosen": [*turns, HELLO], "rejected": [*turns, BYE]},
        {"prompt": "again", "chosen": [*turns, HELLO], "rejected": [*turns, BYE]},
        {"prompt": None, "chosen": [USER, HELLO], "rejected": [USER, HELLO, BYE]},
    )
    rows = read(path)
    for row in rows[:3]:
        assert (row.prompt, row.chosen, row.rejected) == (tuple(turns), (HELLO,), (BYE,))
    assert (rows[3].prompt, rows[3].chosen, rows[3].rejected) == ((USER,), (HELLO,), (HELLO, BYE))


def test_hh_prompt_ends_after_the_last_shared_assistant_marker(tmp_path: Path) -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    path = jsonl(
        tmp_path / "a.jsonl",
        {"chosen": start + " d", "rejected": start + " do"},
        {"chosen": start + " d\n\nHuman: e\n\nAssistant: f", "rejected": start + " g"},
    )
    source = HHSource(str(path), "stop")
    first, second = load(source)
    assert source.findings.counts == {"other_turns": 1}
    assert (first.prompt, first.chosen, first.rejected) == (start, " d", " do")
    assert (second.prompt, second.chosen, second.rejected) == (start, " d\n\nHuman: e\n\nAssistant: f", " g")
    with pytest.raises(RowError, match=r"line 1: column 'chosen': .*do not share a"):
        load(HHSource(str(jsonl(path, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"})), "stop"))
    ends = {"chosen": start + " d", "rejected": start + " e\n\nHuman: f"}
    with pytest.raises(RowError, match=r"line 1: column 'rejected': ends with a turn of the human"):
        load(HHSource(str(jsonl(path, ends)), "stop"))
    with pytest.raises(RowError, match="must be one text"):
        load(HHSource(str(jsonl(path, {"chosen": [USER, HELLO], "rejected": [USER, BYE]})), "stop"))


# ----------------------------------------------------------------------------------------------------- bad input

MALFORMED = {
    "bad json": ('{"prompt": "a", ', None, "not valid JSON"),
    "huge number": ('{"prompt": ' + "9" * 5000 + "}", None, "not valid JSON"),
    "deep nesting": ("[" * 100_000, None, "not valid JSON"),
    "not an object": ("[1, 2]", None, "must be a JSON object, not a list"),
    "missing": ({"prompt": "a", "chosen": "b"}, "rejected", "missing; the row has prompt, chosen"),
    "null": ({**GOOD, "chosen": None}, "chosen", "must be text or a list of messages, not null"),
    "number": ({**GOOD, "rejected": 3}, "rejected", "must be text or a list of messages, not a number"),
    "prompt number": ({**GOOD, "prompt": 3}, "prompt", "must be text or a list of messages, not a number"),
    "prompt messages, text completions": ({**GOOD, "prompt": [USER]}, "prompt", "but the completions are text"),
    "mixed": ({**GOOD, "rejected": [BYE]}, "rejected", "one of chosen and rejected is text"),
    "message text": ({**GOOD, "chosen": ["hi"], "rejected": [BYE]}, "chosen", "message 1 must be an object"),
    "no content": ({"chosen": [USER, {"role": "assistant"}], "rejected": [BYE]}, "chosen", "message 2: 'content'"),
    "surrogate": (r'{"prompt": "a", "chosen": "\ud800", "rejected": "b"}', "chosen", "not UTF-8 at character 1"),
    "preference 2": ({**GOOD, "preference": 2}, "preference", "must be between 0 and 1, not 2"),
    "preference -0.1": ({**GOOD, "preference": -0.1}, "preference", "must be between 0 and 1"),
    "preference nan": ({**GOOD, "preference": float("nan")}, "preference", "must be between 0 and 1, not nan"),
    "preference text": ({**GOOD, "preference": "0.7"}, "preference", "must be a number, not text"),
    "preference bool": ({**GOOD, "preference": True}, "preference", "must be a number, not true or false"),
    "weight -1": ({**GOOD, "weight": -1}, "weight", "must be finite and not negative, not -1"),
    "weight inf": ({**GOOD, "weight": float("inf")}, "weight", "must be finite"),
}


@pytest.mark.parametrize(("bad", "column", "reason"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_row_raises_or_is_skipped_and_listed(
    tmp_path: Path, bad: Any, column: str | None, reason: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", GOOD, "   ", bad, GOOD)
    with pytest.raises(RowError) as caught:
        read(path)
    assert (caught.value.where, caught.value.column) == (f"{path}, line 3", column)
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"{path}, line 3: ")

    source = FileSource(str(path), None, "skip")
    assert [row.where for row in load(source)] == [f"{path}, line 1", f"{path}, line 4"]
    assert source.counts == {"read": 3, "skipped": 1}
    assert [str(error) for error in source.bad_rows] == [str(caught.value)]


@pytest.mark.parametrize(
    ("bad", "column", "reason"),
    [
        ({**GOOD, "chosen": ""}, "chosen", "the completion is empty"),
        ({**GOOD, "rejected": " \n\t"}, "rejected", "the completion is empty"),
        ({**GOOD, "rejected": GOOD["chosen"]}, "rejected", "chosen and rejected are equal"),
        ({"prompt": [USER], "chosen": [], "rejected": [BYE]}, "chosen", "the completion is empty"),
        ({"prompt": [USER], "chosen": [{**HELLO, "content": " "}], "rejected": [BYE]}, "chosen", "is empty"),
        ({"chosen": "same", "rejected": "same"}, "rejected", "equal"),
    ],
)
def test_row_without_preference_is_skipped_and_counted(tmp_path: Path, bad: Any, column: str, reason: str) -> None:
    source = FileSource(str(jsonl(tmp_path / "a.jsonl", bad, GOOD)), None, "stop")
    assert len(load(source)) == 1
    (error,) = source.bad_rows
    assert isinstance(error, NoPreference)
    assert error.column == column and reason in error.reason and "line 1" in error.where
    assert source.counts == {"read": 2, "skipped": 1}


def test_invalid_utf8_is_reported_with_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(good + b'{"prompt": "caf\xe9"}\n' + good)
    with pytest.raises(RowError, match=r"line 2: not UTF-8 \(byte 16 of the line is 0xe9\)"):
        read(path)
    assert len(read(path, "skip")) == 2
    table = tmp_path / "b.csv"
    table.write_bytes(b"prompt,chosen,rejected\na,b,c\na,caf\xe9,d\na,b,d\n")
    with pytest.raises(RowError, match="line 3: column 'chosen': not UTF-8 at character 4"):
        read(table)
    assert len(read(table, "skip")) == 2


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\na,b,c\n")
    assert len(read(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "not gzip"])
def test_damaged_gzip_file_is_reported(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.jsonl.gz"
    rows = [{**GOOD, "prompt": f"{i}{i * 7919 % 104729}"} for i in range(3000)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    half = len(whole) // 2
    path.write_bytes(
        {"truncated": whole[:half], "corrupt": whole[:half] + b"\xff" * 99 + whole[half + 99 :], "not gzip": b"{}"}[
            damage
        ]
    )
    with pytest.raises(RowError, match=r"a\.jsonl\.gz, line \d+: (the gzip file is cut off or damaged|not)") as caught:
        read(path)
    assert caught.value.where.startswith(str(path))
    if damage == "truncated":
        source = FileSource(str(path), None, "skip")
        rows_left = load(source)
        assert 0 < len(rows_left) < 3000
        assert source.counts == {"read": len(rows_left) + 1, "skipped": 1}
        assert source.bad_rows[0].where == f"{path}, line {len(rows_left) + 1}"


def test_damaged_csv_and_parquet_files_are_reported(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("prompt,chosen,rejected,preference\na,b,c,\na,b,c,0.5,7\na,b\n\na,b,c,x\n")
    with pytest.raises(RowError, match="line 3: has 5 fields, but the header has 4"):
        read(table)
    source = FileSource(str(table), None, "skip")
    assert len(load(source)) == 1
    assert [str(error).removeprefix(f"{table}, ") for error in source.bad_rows] == [
        "line 3: has 5 fields, but the header has 4",
        "line 4: has 2 fields, but the header has 4",
        "line 6: column 'preference': must be a number, not text",
    ]
    parquet = tmp_path / "b.parquet"
    parquet.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(RowError, match=r"b\.parquet, row 1: not a readable parquet file"):
        read(parquet)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "chosen": [1], "rejected": ["c"]}), parquet)
    with pytest.raises(RowError, match="row 1: column 'chosen': must be text"):
        read(parquet)


def test_csv_cell_of_any_length_is_read(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text(f"prompt,chosen,rejected\n{'long ' * 60_000},b,c\n")
    limit = 131_072
    csv.field_size_limit(limit)
    (row,) = read(table)
    assert len(row.prompt) == 300_000 and csv.field_size_limit() == limit
    table.write_text('prompt,chosen,rejected\n"a,b,c\n')
    with pytest.raises(RowError, match="line 2: not valid csv"):
        read(table)
    assert csv.field_size_limit() == limit


def test_columns_with_the_same_name_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,chosen,rejected\na,b,c,d\nb,b,c,d\n")
    columns = [pyarrow.array([text, text]) for text in "abcd"]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "chosen", "chosen", "rejected"])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    for name, where in (("a.csv", "line 2"), ("b.parquet", "row 1")):
        source = FileSource(str(tmp_path / name), None, "stop")
        assert {row.chosen for row in load(source)} == {"c"}
        assert source.findings.counts["duplicate_keys"] == 2
        assert source.findings.first["duplicate_keys"].endswith(where)


def test_missing_empty_and_unusable_paths_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=.*nowhere\.jsonl: no such file or folder"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"the folder does not contain a \.jsonl"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt: not a \.jsonl"):
        read(tmp_path / "a.txt")
    for name in ("a.jsonl", "a.csv", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
        with pytest.raises(DataError, match="the file does not contain a row"):
            read(tmp_path / name)
    with pytest.raises(DataError, match=r"none of its 2 rows can be used; the first problem: .*line 1: not valid JSON"):
        read(jsonl(tmp_path / "a.jsonl", "{", "["), "skip")
    with pytest.raises(DataError, match="choose stop or skip"):
        read(tmp_path / "a.jsonl", "ignore")


# ----------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "mine"
    data.mkdir()
    for split, n in (("train", 4), ("validation", 2), ("test", 3)):
        jsonl(
            data / f"{split}.jsonl",
            *({"q": f"{split} {i}", "chosen": "a", "rejected": "b", "preference": 0.8, "other": i} for i in range(n)),
        )
    return data


def test_local_data_set_folder_gives_splits_and_columns(folder: Path) -> None:
    def hub(split: Any) -> list[Row]:
        return load(HubSource(str(folder), None, None, split, {"prompt": "q"}, "stop"))

    rows = hub({"train": "train", "selection": "validation", "test": "test"})
    assert [(row.prompt, row.split) for row in rows] == [
        *((f"train {i}", "train") for i in range(4)),
        *((f"validation {i}", "selection") for i in range(2)),
        *((f"test {i}", "test") for i in range(3)),
    ]
    assert rows[0] == Row("train 0", "a", "b", 0.8, None, "train", f"{folder}[train], row 0")
    assert [row.prompt for row in hub("test")] == ["test 0", "test 1", "test 2"]
    assert {row.split for row in hub("test")} == {None}
    assert {row.split for row in hub({"train": "validation", "selection": None, "test": "test"})} == {"train", "test"}
    with pytest.raises(DataError, match="split 'nosuch': cannot be loaded"):
        hub("nosuch")
    with pytest.raises(DataError, match="set the data set's split to train on"):
        hub({"test": "test"})
    with pytest.raises(DataError, match=r"unknown \['dev'\]"):
        hub({"train": "train", "dev": "validation"})
