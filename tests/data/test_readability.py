"""Openings of real responses, labelled by how easy they read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spo import cli
from spo.data import RowError
from spo.data.readability import LabelledOpenings, opening, readability

EASY, HARD = "Run a bit each day.", "Regular exercise helps people sleep."
MIDDLE = "Regular sleep helps most people."


def complete(prompts: Sequence[str]) -> list[str]:
    raise AssertionError("the file contains completions")


def source(folder: Path, *records: dict[str, Any], **changes: Any) -> LabelledOpenings:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments: dict[str, Any] = {"columns": None, "on_bad_row": "stop", "reward": readability, "max_characters": 60}
    return LabelledOpenings(str(file), **{**arguments, **changes})


def test_readability_is_minus_the_automated_readability_index() -> None:
    texts = [HARD, f"{HARD} {HARD}", EASY, "Internationalization.", "", "12 **"]
    grade = 4.71 * 31 / 5 + 0.5 * 5 - 21.43
    expected = [-grade, -grade, 0.0, -20.0, -20.0, 0.0]
    assert readability(["x"] * 6, texts)["reward"] == pytest.approx(expected)
    # A long sentence is harder than the same words in two.
    long, short = readability(["x"] * 2, [f"{HARD[:-1]} and {HARD}", f"{HARD} And {HARD}"])["reward"]
    assert long < short


@pytest.mark.parametrize(
    ("text", "characters", "expected"),
    [
        ("One. Two! Three?", 9, "One. Two!"),
        ("One. Two! Three?", 8, "One."),
        ("One. Two! Three?", 3, ""),
        ("  One two\n\n* three four", 12, "One two"),
        ('He said "no." She left.', 13, 'He said "no."'),
        ("Pi is 3.14 and so on", 10, ""),
        ("whole", 5, "whole"),
    ],
)
def test_an_opening_is_whole_sentences_and_lines(text: str, characters: int, expected: str) -> None:
    assert opening(text, characters) == expected


def test_the_reward_labels_the_openings(tmp_path: Path) -> None:
    first = {"prompt": "How? ", "chosen": f"{HARD} {HARD}", "rejected": f"{EASY}\nMore and more.", "preference": 0.9}
    second = {"prompt": "Why?", "chosen": MIDDLE, "rejected": HARD}
    found = source(tmp_path, first, second, max_characters=38)
    rows = found.rows(complete)
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [
        ("How?\n", f"{EASY}\nMore and more.", HARD),
        ("Why?\n", MIDDLE, HARD),
    ]
    assert [row.preference for row in rows] == [None, None] and found.counts == {"read": 2, "skipped": 0}


def test_pairs_without_a_preference_are_skipped(tmp_path: Path) -> None:
    long = {"prompt": "How?", "chosen": EASY, "rejected": "a sentence that is longer than the limit of characters."}
    equal = {"prompt": "How?", "chosen": EASY, "rejected": "Eat a bit each day."}
    good = {"prompt": "How?", "chosen": EASY, "rejected": HARD}
    found = source(tmp_path, long, equal, good, max_characters=40)
    assert len(found.rows(complete)) == 1
    assert [error.reason for error in found.bad_rows] == [
        "a response does not begin with a sentence of at most 40 characters",
        "the rewards of both openings are equal",
    ]


def test_messages_are_rejected(tmp_path: Path) -> None:
    turns = {name: [{"role": role, "content": name}] for name, role in
             (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))}  # fmt: skip
    with pytest.raises(RowError, match="openings need text in prompt, chosen and rejected"):
        source(tmp_path, turns).rows(complete)


def test_the_study_without_its_folder_is_an_error_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "elsewhere"
    monkeypatch.setenv("SPO_DATA_DIR", str(folder))
    assert cli.main(["train", "experiment=study/real_pairs"]) == 1
    printed = capsys.readouterr().err
    assert "2 problems" in printed  # and the preset suits all of its jobs
    assert f"model.path={folder}/stories260K: there is no such folder" in printed
    assert f"data.path={folder}/alpaca_eval_pairs.train.jsonl.gz: there is no such file" in printed
