"""Situations from public reports about data, templates, tokenizers and loading; docs/explanation/field-reports.md."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spo.data.rendering import Renderer, TokenizedPair
from spo.data.rows import DataError, Row
from spo.models.tokenizer import as_in_file
from spo.notes import collect_notes
from tests.data.tokenizers_built_here import ENDS_IN_EOS, build


def save_tokenizer(folder: Path, *, named: str) -> Tokenizer:
    """Save a tokenizer that splits numbers into digits, under the name of a class; return it."""
    merges = [("2", "0"), ("2", "3"), ("20", "23"), ("Ċ", "Ċ")]
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    stored = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    stored.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    stored.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=stored, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": named, "chat_template": "{{ 1 }}"}))
    return stored


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "GPTNeoXTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_the_rules_of_tokenizer_json_encode(tmp_path: Path, named: str) -> None:
    stored = save_tokenizer(tmp_path, named=named)
    text = "In 2023:\n\n20"
    ids = stored.encode(text, add_special_tokens=False).ids
    replaced = AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] != ids
    with collect_notes() as notes:
        found = as_in_file(AutoTokenizer.from_pretrained(tmp_path), tmp_path)
    assert found(text, add_special_tokens=False)["input_ids"] == ids
    assert (found.bos_token, found.eos_token, found.chat_template) == ("<s>", "</s>", "{{ 1 }}")
    assert ("notes/tokenizer_class" in notes) >= replaced
    if named == "GPT2Tokenizer":
        assert replaced  # otherwise this test shows nothing


def test_a_tokenizer_that_agrees_with_its_file_keeps_its_class(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, named="PreTrainedTokenizerFast")
    with collect_notes() as notes:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert as_in_file(tokenizer, tmp_path) is tokenizer
    assert notes == {}


DATED = (
    "{% if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}"
    '{{ day }}|{{ strftime_now("%H:%M:%S") }}'
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
)


def test_a_chat_template_reads_a_clock_that_stands_still() -> None:
    chosen, rejected = (({"role": "assistant", "content": text},) for text in "cd")
    row = Row(({"role": "user", "content": "p"},), chosen, rejected)

    def rendered(template: str, **kwargs: object) -> tuple[str, list[str]]:
        renderer = Renderer(build("adds_bos", template), 99, "drop_pair", chat_template_kwargs=kwargs)
        pair = renderer.render(row)
        assert isinstance(pair, TokenizedPair)
        return pair.prompt_text, [key for key, _, _ in renderer.notes()]

    assert rendered(DATED, strftime_now="2024-07-26") == ("26 Jul 2024|00:00:00[user]p</s>", [])
    assert rendered(DATED, strftime_now="2024-07-26 10:00", day="D")[0].startswith("D|10:00:00[")
    text, notes = rendered(DATED)
    assert text.startswith(f"{datetime.now():%d %b %Y}|") and notes == ["current_date"]
    assert rendered("{% if strftime_now is defined %}now{% endif %}" + ENDS_IN_EOS)[1] == []
    with pytest.raises(DataError, match=r"strftime_now=today: write a date such as 2026-01-31"):
        rendered(DATED, strftime_now="today")
