"""The view of ``spo inspect``."""

from __future__ import annotations

import io

from rich.console import Console

from spo.data import Renderer, Row, TokenizedPair
from spo.pages.rows import show_rows
from tests.data.tokenizers_built_here import build


def shown(kind: str, *, terminal: bool = False) -> str:
    tokenizer = build(kind)
    pair = Renderer(tokenizer, 64, "drop_pair").render(
        Row("on?[bold]", " the cat", "on", 0.75, where="a.jsonl, line 3")
    )
    assert isinstance(pair, TokenizedPair)
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=terminal, color_system="standard" if terminal else None)
    show_rows([pair] * 3, tokenizer, 2, {"read": 1234, "used": 3}, console)
    return stream.getvalue()


def test_plain_output_shows_tokens_masks_text_and_counts() -> None:
    text = shown("adds_bos")
    assert "1. a.jsonl, line 3" in text and "2. a.jsonl, line 3" in text and "3. a.jsonl" not in text
    assert "\x1b" not in text
    # Text in square brackets is data, not markup.
    assert "on?[bold]" in text
    assert "BOS <s>:1 on:" in text and "EOS </s>:2" in text and "cat:" in text
    assert "tokens of prompt + chosen: 9 + 4" in text and "........." + "####" in text
    assert "tokens of prompt + rejected: 9 + 2" in text
    assert "preference: 0.75" in text and "1,234" in text


def test_bos_and_eos_are_marked_by_position() -> None:
    # BOS and EOS are one id: it is BOS at the start, EOS at the end.
    text = shown("bos_is_eos_is_pad")
    assert text.count("BOS <s>:1") == text.count("EOS <s>:1") == 4
    assert "BOS" not in shown("no_bos")


def test_a_terminal_gets_colors() -> None:
    assert "\x1b[" in shown("adds_bos", terminal=True)
