"""The view of ``spo inspect``."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from spo import cli
from spo.data import Renderer, Row, TokenizedPair
from spo.pages.rows import show_rows
from spo.records.files import write_jsonl
from tests.data.tokenizers_built_here import ENDS_IN_EOS, build
from tests.helpers import tiny_llama


def shown(kind: str, *, terminal: bool = False) -> str:
    tokenizer = build(kind)
    pair = Renderer(tokenizer, 64, "drop_pair").render(
        Row("on?[bold]", " the cat", "on", 0.75, where="a.jsonl, line 3")
    )
    assert isinstance(pair, TokenizedPair)
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=terminal, color_system="standard" if terminal else None)
    show_rows([pair] * 3, tokenizer, 2, {"read": 1234, "used": 3}, console=console)
    return stream.getvalue()


def test_plain_output_has_tokens_masks_text_and_counts() -> None:
    text = shown("adds_bos")
    assert "1. a.jsonl, line 3" in text and "2. a.jsonl, line 3" in text and "3. a.jsonl" not in text
    assert "\x1b" not in text
    # Text in square brackets is data, not markup.
    assert "on?[bold]" in text
    assert "BOS <s>:1 on:" in text and "EOS </s>:2" in text and "cat:" in text
    assert "tokens of prompt + chosen: 9 + 4" in text and "........." + "####" in text
    assert "tokens of prompt + rejected: 9 + 2" in text
    assert "preference: 0.75" in text and "1,234" in text


def test_special_tokens_are_marked_by_position() -> None:
    # BOS and EOS are one id: it is BOS at the start, EOS at the end.
    text = shown("bos_is_eos_is_pad")
    assert text.count("BOS <s>:1") == text.count("EOS <s>:1") == 4
    assert "BOS" not in shown("no_bos")


def test_end_of_a_turn_is_marked() -> None:
    tokenizer = build("adds_bos", ENDS_IN_EOS.replace("</s>", "<pad>"))
    renderer = Renderer(tokenizer, 64, "drop_pair")
    turns = [({"role": role, "content": text},) for role, text in (("user", "on?"), ("assistant", "cat"))]
    pair = renderer.render(Row(*turns))
    assert isinstance(pair, TokenizedPair)
    stream = io.StringIO()
    show_rows([pair], tokenizer, 1, {}, renderer.stop_ids, Console(file=stream, width=200))
    assert stream.getvalue().count("END <pad>:3") == 1 and "EOS" not in stream.getvalue()


def test_terminal_output_has_colors() -> None:
    assert "\x1b[" in shown("adds_bos", terminal=True)


@pytest.mark.slow
def test_json_has_the_tokens_and_texts_of_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = build("adds_bos", ENDS_IN_EOS.replace("</s>", "<pad>"))
    tiny_llama(dtype=torch.float32, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [({"role": "user", "content": f"on {i}?"}, {"role": "assistant", "content": f"cat {i}"}) for i in range(20)]
    worse = {"role": "assistant", "content": "the</s>"}
    rows = [{"prompt": [question], "chosen": [answer], "rejected": [worse]} for question, answer in turns]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = ["data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", "data.min_pairs=8", "data.max_length=64"]
    model = ["model=hf", f"model.path={tmp_path / 'model'}", f"paths.cache={tmp_path / 'cache'}", "sft.max_steps=0"]
    assert cli.main(["inspect", *data, *model, "--json", str(tmp_path / "out.json")]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["where"].rpartition(" ")[2] for row in written] == [str(i) for i in range(1, 21)]
    assert {row["split"] for row in written} == {"train", "selection", "test"}
    for i, row in enumerate(written):
        assert row["prompt_text"] == f"[user]on {i}?<pad>\n[assistant]" == tokenizer.decode(row["prompt_ids"])
        assert (row["chosen_text"], row["rejected_text"]) == (f"cat {i}", "the</s>")
        assert tokenizer.decode(row["chosen_ids"]) == f"cat {i}<pad>"
        assert tokenizer.decode(row["rejected_ids"]) == "the</s><pad>"
        # The text of the EOS token is text.
        assert set(row["rejected_ids"]) & {1, 2, 3} == {3} and row["stop_ids"] == [2, 3]
    assert cli.main(["inspect", *data, *model, "--json", str(tmp_path / "no" / "out.json")]) == 1
    assert "--json" in capsys.readouterr().err

    template = tmp_path / "template.jinja"
    # Editors of other systems write a byte-order mark and their own line ends.
    template.write_bytes("\ufeff{% for m in messages %}\r\n({{ m.role }}){{ m.content }}</s>{% endfor %}".encode())
    arguments = [f"data.chat_template={template}", "--json", str(tmp_path / "out.json")]
    assert cli.main(["inspect", *data, *model, *arguments]) == 0
    assert json.loads((tmp_path / "out.json").read_text())[0]["prompt_text"].startswith("(user)on 0?</s>")
    template.unlink()
    assert cli.main(["inspect", *data, *model, *arguments]) == 1
    assert f"data.chat_template={template}: there is no such file" in capsys.readouterr().err
