"""Situations from public reports about data, templates, tokenizers and loading; docs/explanation/field-reports.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spo.models.tokenizer import as_in_file
from spo.notes import collect_notes


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
