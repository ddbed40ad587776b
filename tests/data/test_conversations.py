"""Rows of messages: all fields, tools, prompts that are given twice, and rows that are refused or noted."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from spo.data import FileSource, HubSource, NoPreference, RankedFileSource, Row, RowError, prompt_id
from spo.data.findings import SENTENCES, Findings
from spo.data.messages import is_empty
from spo.data.tables import TableSource
from spo.notes import collect_notes


def turn(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


ASK, AGAIN, SYSTEM = turn("user", "hi"), turn("user", "again"), turn("system", "be brief")
HELLO, BYE = turn("assistant", "hello"), turn("assistant", "bye")
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLING = turn("assistant", "", tool_calls=[CALL])
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
CHAT = {"prompt": [ASK], "chosen": [HELLO], "rejected": [BYE]}
TEXT = {"prompt": "What is red in the garden?", "chosen": " A rose.", "rejected": " The sky."}


def source(folder: Path, *rows: Any, on_bad_row: Any = "stop", columns: dict[str, str] | None = None) -> TableSource:
    path = folder / "a.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    if "responses" in path.read_text("utf-8"):
        return RankedFileSource(str(path), columns, on_bad_row, None)
    return FileSource(str(path), columns, on_bad_row)


def load(made: TableSource) -> list[Row]:
    return made.rows(lambda prompts, n: [])


def counts(folder: Path, *rows: Any) -> dict[str, int]:
    made = source(folder, *rows)
    load(made)
    return dict(made.findings.counts)


# -------------------------------------------------------------------------------------------------------- messages


def test_all_fields_of_messages_and_tools_are_kept(tmp_path: Path) -> None:
    result = turn("tool", "12 degrees", tool_call_id="c1", name="weather")
    reason = turn("assistant", "cold", reasoning_content="12 is low")
    record = {
        "prompt": [turn("user", [{"type": "text", "text": "Oslo?"}], name="Ann"), CALLING, result],
        "chosen": [reason],
        "rejected": [BYE],
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (row,) = load(source(tmp_path, record))
    assert (row.prompt, row.chosen, row.rejected) == (tuple(record["prompt"]), (reason,), (BYE,))
    assert (row.tools, row.template_kwargs) == ((TOOL,), {"enable_thinking": False})
    printed = {**record, "tools": json.dumps([TOOL]), "chat_template_kwargs": '{"enable_thinking": false}'}
    assert load(source(tmp_path, printed)) == [row]
    assert load(source(tmp_path, {**record, "tools": [json.dumps(TOOL)]})) == [row]
    nothing: Any
    for nothing in (None, [], "", " "):
        (plain,) = load(source(tmp_path, {**record, "tools": nothing, "chat_template_kwargs": None}))
        assert (plain.tools, plain.template_kwargs) == (None, None)
    named = {("functions" if key == "tools" else key): value for key, value in record.items()}
    assert load(source(tmp_path, named, columns={"tools": "functions"})) == [row]


def test_parquet_and_hub_give_the_rows_of_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    other = {"type": "function", "function": {"name": "time", "parameters": {"properties": {"b": {"enum": ["x"]}}}}}
    silent = {key: value for key, value in CALLING.items() if key != "content"}
    records: list[dict[str, Any]] = [
        {"prompt": [ASK, silent, turn("tool", "3")], "chosen": [HELLO], "rejected": [BYE], "tools": [TOOL, other]},
        {"prompt": [ASK], "chosen": [HELLO, AGAIN, BYE], "rejected": [BYE], "tools": None},
    ]
    expected = load(source(tmp_path, *records))
    assert expected[0].prompt[1] == {**CALLING, "content": None}

    def content(rows: list[Row]) -> list[Any]:
        return [(row.prompt, row.chosen, row.rejected, row.tools) for row in rows]

    # The columns of a table give every message every field.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    assert content(load(FileSource(str(tmp_path / "b.parquet"), None, "stop"))) == content(expected)
    (tmp_path / "hub").mkdir()
    (tmp_path / "b.parquet").rename(tmp_path / "hub" / "train.parquet")
    hub = HubSource(str(tmp_path / "hub"), None, None, "train", None, "stop")
    assert content(load(hub)) == content(expected)
    null_fields = [{**records[0], "prompt": [{**ASK, "tool_calls": None, "name": None}, *records[0]["prompt"][1:]]}]
    assert content(load(source(tmp_path, *null_fields))) == content(expected[:1])


def test_emptiness_and_equality_consider_all_fields(tmp_path: Path) -> None:
    thinks, guesses = (turn("assistant", "2", reasoning_content=text) for text in ("add", "guess"))
    rows = load(
        source(
            tmp_path,
            {**CHAT, "chosen": [CALLING]},
            {**CHAT, "chosen": [thinks], "rejected": [guesses]},
            {"chosen": [ASK, {**CALLING, "content": None}, HELLO], "rejected": [ASK, CALLING, HELLO]},
        )
    )
    assert [len(row.prompt) for row in rows] == [1, 1, 1]
    blank = turn("assistant", " ", tool_calls=[], reasoning_content="\n", name="x", id="1", weight=1)
    made = source(tmp_path, CHAT, {**CHAT, "rejected": [blank]}, {**CHAT, "rejected": [HELLO]})
    assert len(load(made)) == 1
    assert [(type(bad), bad.reason) for bad in made.bad_rows] == [
        (NoPreference, "the completion is empty"),
        (NoPreference, "chosen and rejected are equal"),
    ]
    assert is_empty((blank,)) and not is_empty((turn("assistant", [{"type": "text", "text": "x"}]),))


MALFORMED = {
    "content number": ({**CHAT, "prompt": [turn("user", 3)]}, "prompt", "message 1: 'content' must be text or a list"),
    "content null": ({**CHAT, "chosen": [turn("assistant", None, name="x")]}, "chosen", "parts, not null"),
    "image": ({**CHAT, "prompt": [turn("user", [{"type": "image"}])]}, "prompt", "has the type 'image', and only 'te"),
    "part text": ({**CHAT, "prompt": [turn("user", ["hi"])]}, "prompt", "part 1 of 'content' must be an object"),
    "part null": ({**CHAT, "prompt": [turn("user", [{"type": "text"}])]}, "prompt", "'text' must be text, not null"),
    "role null": ({**CHAT, "prompt": [turn(None, "hi")]}, "prompt", "'role' must be text, not null"),  # type: ignore[arg-type]
    "human": ({**CHAT, "prompt": [turn("human", "hi")]}, "prompt", "write the role 'human' as 'user'"),
    "Assistant": ({**CHAT, "chosen": [turn("Assistant", "x")]}, "chosen", "write the role 'Assistant' as 'assistant'"),
    "ShareGPT": ({**CHAT, "chosen": [{"from": "gpt", "value": "x"}]}, "chosen", "ShareGPT's keys 'from' and 'value'"),
    "one message": ({**CHAT, "chosen": HELLO}, "chosen", "not an object; a single message also needs a list"),
    "surrogate": ({**CHAT, "chosen": [turn("assistant", "", x={"a": ["\ud800"]})]}, "chosen", "not UTF-8 at char"),
    "deep": ('{"chosen": [{"role": "assistant", "content": "", "x": ' + "[" * 700 + "]" * 700 + '}], "rejected": []}',
             "chosen", "nested too deeply"),
    "tools object": ({**CHAT, "tools": TOOL}, "tools", "must be a list of objects, one for each tool, not an object"),
    "tools number": ({**CHAT, "tools": [3]}, "tools", "one for each tool, not with a number"),
    "tools text": ({**CHAT, "tools": "[{"}, "tools", "not valid JSON"),
    "kwargs list": ({**CHAT, "chat_template_kwargs": [1]}, "chat_template_kwargs", "must be an object, not a list"),
    "kwargs reserved": ({**CHAT, "chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs",
                        "'add_generation_prompt' is not a choice of the data"),
    "ends user": ({**CHAT, "chosen": [HELLO, ASK]}, "chosen", "ends with a message of the user; the last message must"),
    "ends tool": ({**CHAT, "rejected": [CALLING, turn("tool", "3")]}, "rejected", "ends with a message of the tool"),
    "whole ends user": ({"chosen": [ASK, HELLO, ASK], "rejected": [ASK, BYE, ASK]}, "chosen", "ends with a message"),
    "begins user": ({**CHAT, "chosen": [AGAIN, HELLO]}, "chosen", "begins with a message of the user that does not"),
    "begins system": ({**CHAT, "rejected": [SYSTEM, ASK, BYE]}, "rejected", "begins with a message of the system"),
    "in the prompt": ({**CHAT, "prompt": [ASK, HELLO]}, "chosen", "begins with the last message of the prompt"),
    "two prompts": ({"prompt": None, "chosen": [ASK, HELLO], "rejected": [AGAIN, BYE]}, "rejected",
                    "message 1 is a message of the user, but the conversations of the row already differ there (in co"),
    "JSON list": ({**TEXT, "chosen": json.dumps([HELLO])}, "chosen", "contains messages as JSON text; write them as"),
    "JSON object": ({**TEXT, "chosen": json.dumps({"messages": [ASK, HELLO], "tools": []})}, "chosen", "as JSON text"),
    "JSON under any key": ({**TEXT, "chosen": json.dumps({"dialog": [HELLO]})}, "chosen", "as JSON text"),
    "JSON twice": ({**TEXT, "chosen": json.dumps(json.dumps([HELLO]))}, "chosen", "as JSON text"),
    "JSON message": ({**TEXT, "prompt": json.dumps(ASK)}, "prompt", "as JSON text"),
    "printed by Python": ({**TEXT, "rejected": str([HELLO])}, "rejected", "as JSON text"),
    "other name": ({"question": "Why?", "chosen": "The sun", "rejected": "The moon"}, "prompt",
                   "do not begin with 'question'; set data.source.columns={prompt: question}"),
    "conversations": ({"conversations": [ASK], "chosen": [HELLO], "rejected": [BYE]}, "prompt", "'conversations'"),
}  # fmt: skip


@pytest.mark.parametrize(("bad", "column", "reason"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_conversation_raises_with_its_column(tmp_path: Path, bad: Any, column: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        load(source(tmp_path, CHAT, bad))
    assert (caught.value.where, caught.value.column) == (f"{tmp_path / 'a.jsonl'}, line 2", column)
    assert reason in caught.value.reason
    assert not isinstance(caught.value, NoPreference)


def test_json_that_is_not_messages_is_text(tmp_path: Path) -> None:
    answers = [
        '{"role": "user", "age": 3}',
        '{"role": "owner", "content": ""}',
        "[1]",
        "[]",
        "[INST] hi",
        '"hi"',
        '"Hi," he said.',
        "{'role': 1}",
    ]
    assert [row.chosen for row in load(source(tmp_path, *({**TEXT, "chosen": text} for text in answers)))] == answers


# --------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("responses", [False, True])
def test_repeated_and_text_prompts_give_one_prompt(tmp_path: Path, responses: bool) -> None:
    def row(prompt: Any, *before: Any) -> dict[str, Any]:
        answers = [[*before, HELLO], [*before, BYE]]
        ranked = {"prompt": prompt, "responses": answers, "order": [0, 1]}
        return ranked if responses else {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}

    talk = [SYSTEM, ASK, HELLO, AGAIN]
    forms = [
        (row([ASK]), [ASK], 0),
        (row([ASK], ASK), [ASK], 1),
        (row(talk, *talk), talk, 1),
        (row(talk, *talk[1:]), talk, 1),  # without the system turn
        (row(talk, AGAIN), talk, 1),
        (row("hi"), [ASK], 0),
        (row("hi", ASK), [ASK], 0),
        (row("hi", SYSTEM, ASK), [SYSTEM, ASK], 0),
        (row("again ", *talk), talk, 0),
    ]
    for record, prompt, repeated in forms:
        made = source(tmp_path, record)
        assert [(r.prompt, r.chosen, r.rejected) for r in load(made)] == [(tuple(prompt), (HELLO,), (BYE,))]
        assert made.findings.counts == ({"repeated_prompts": 1} if repeated else {})


def test_one_completion_may_repeat_the_prompt(tmp_path: Path) -> None:
    twice = [ASK, BYE]
    made = source(tmp_path, {**CHAT, "rejected": twice}, {"prompt": "hi", "chosen": [HELLO], "rejected": twice})
    assert [(row.prompt, row.chosen, row.rejected) for row in load(made)] == [((ASK,), (HELLO,), (BYE,))] * 2
    assert made.findings.counts == {"repeated_prompts": 2, "repeated_rows": 1}


def test_repeated_text_prompt_is_removed(tmp_path: Path) -> None:
    def pair(prompt: str, before: str, after: str = " ") -> dict[str, str]:
        return {"prompt": prompt, "chosen": f"{before}{after}yes", "rejected": f"{before}{after}no"}

    long, short = TEXT["prompt"], "1 + 2 ="
    repeats = [pair(long, long), pair(long + "\n", long), pair(short, short)]
    made = source(tmp_path, *repeats, TEXT, {**TEXT, "prompt": "x"}, CHAT)
    assert [row.chosen for row in load(made)][:3] == [" yes", " yes", f"{short} yes"]
    assert made.findings.counts == {"repeated_prompts": 2, "short_repeats": 1}
    # Most rows repeat their prompts, so a short one does not recur by chance.
    made = source(tmp_path, pair(short, short), pair("2 + 2 =", "2 + 2 ="), TEXT)
    assert [row.chosen for row in load(made)] == [" yes", " yes", TEXT["chosen"]]
    assert made.findings.counts == {"repeated_prompts": 2}
    # A word may begin like the prompt, and one completion may quote it.
    kept = [pair("I", "I", "t is "), {**TEXT, "rejected": f"{long} No."}]
    assert [row.chosen for row in load(source(tmp_path, *kept))] == ["It is yes", TEXT["chosen"]]
    made = source(tmp_path, pair(long, long), {"prompt": long, "chosen": long, "rejected": f"{long} no"})
    assert len(load(made)) == 1 and made.bad_rows[0].reason == "a completion only repeats the prompt"
    assert made.counts == {"read": 2, "skipped": 1}


# ----------------------------------------------------------------------------------------------------------- notes


def test_peculiar_rows_are_counted(tmp_path: Path) -> None:
    whole: dict[str, Any] = {"chosen": [ASK, HELLO], "rejected": [ASK, BYE]}
    longer = {"chosen": [ASK, HELLO, AGAIN, HELLO], "rejected": [ASK, HELLO, AGAIN, BYE]}
    twice = json.dumps(TEXT)[:-1] + ', "rejected": "b"}'
    nested = '{"a": {"b": 1, "b": 2}, ' + json.dumps({**TEXT, "chosen": "c"})[1:]
    found: dict[str, tuple[list[Any], int]] = {
        "implied_prompts": ([TEXT, {**whole, "prompt": None}, {**longer, "prompt": []}], 2),
        "duplicate_keys": ([TEXT, twice, nested], 2),
        "ignored_columns": ([{**TEXT, "system": "x", "tools": [TOOL]}, {**TEXT, "history": [], "chosen": "c"}], 1),
        "empty_prompts": ([{**TEXT, "prompt": ""}, {**CHAT, "prompt": [SYSTEM]}], 2),
        "prompt_not_in_conversation": ([{**whole, "prompt": "Why?"}], 1),
        "other_turns": ([{**CHAT, "chosen": [HELLO, AGAIN, BYE]}, CHAT], 1),
        "repeated_rows": ([TEXT, {**TEXT, "source": "b"}, {**TEXT, "preference": 0.9}], 1),
    }
    for kind, (rows, count) in found.items():
        assert counts(tmp_path, *rows) == {kind: count}, kind
    # Data without a prompt column is a usual format.
    assert counts(tmp_path, whole) == counts(tmp_path, CHAT, TEXT) == {}


def test_contradicting_pairs_are_counted_once(tmp_path: Path) -> None:
    swapped = {**TEXT, "chosen": TEXT["rejected"], "rejected": TEXT["chosen"]}
    assert counts(tmp_path, TEXT, swapped, {**TEXT, "weight": 2}) == {"contradicting_pairs": 1}
    assert counts(tmp_path, TEXT, {**swapped, "preference": 0.2}) == {}
    assert counts(tmp_path, TEXT, {**TEXT, "preference": 0.2}) == {"contradicting_pairs": 1}
    assert counts(tmp_path, TEXT, {**swapped, "preference": 0.5}, {**swapped, "prompt": "other"}) == {}
    order = {"prompt": "p", "responses": ["a", "b", "c"]}
    assert counts(tmp_path, {**order, "order": [0, 1, 2]}, {**order, "order": [2, 0, 1]}) == {"contradicting_pairs": 2}


def test_findings_become_notes_with_count_and_place(caplog: pytest.LogCaptureFixture) -> None:
    findings = Findings()
    for kind in SENTENCES:
        findings.add(kind, f"first {kind}")
        findings.add(kind, "second")
    with caplog.at_level(logging.WARNING), collect_notes() as notes:
        findings.write_notes()
    assert notes == {f"notes/{kind}": 2.0 for kind in SENTENCES}
    for kind, line in zip(SENTENCES, caplog.messages, strict=True):
        assert f"first {kind}" in line and "second" not in line
        assert "2" in line or kind == "ignored_columns"


def test_every_kind_of_finding_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "data.md").read_text("utf-8")
    assert [kind for kind in SENTENCES if f"| `{kind}` |" not in text] == []


def test_prompt_id_changes_only_with_what_the_template_reads() -> None:
    # Stored results and splits depend on these digests.
    assert prompt_id("What is red?") == "d3bc5c20713e5600"
    assert prompt_id((ASK,)) == prompt_id((ASK,), None, None) == prompt_id((ASK,), (), {}) == "338773c8e585959b"
    ids = [prompt_id((ASK,), tools, kwargs) for tools, kwargs in [(None, None), ((TOOL,), None), (None, {"a": False})]]
    assert len(set(ids)) == 3
