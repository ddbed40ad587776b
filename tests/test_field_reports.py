"""Situations from public reports about data, templates, tokenizers and loading; docs/explanation/field-reports.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from spo.config.checks import problems
from spo.config.compose import compose
from spo.data.rendering import Renderer, TokenizedPair
from spo.data.rows import DataError, Row
from spo.models.adapters import with_given_adapter
from spo.models.tokenizer import as_in_file
from spo.notes import collect_notes
from tests.data.tokenizers_built_here import ENDS_IN_EOS, build
from tests.helpers import save_model


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


def test_every_test_of_the_page_exists() -> None:
    root = Path(__file__).parent
    page = (root.parent / "docs" / "explanation" / "field-reports.md").read_text()
    rows = [line.strip("|").rpartition("|")[2] for line in page.splitlines() if line.startswith("| [")]
    defined = {name for file in root.rglob("test_*.py") for name in re.findall(r"def test_(\w+)", file.read_text())}
    named = [re.findall(r"`(\w+)`", row) for row in rows]
    assert len(rows) > 15 and all(named) and {name for names in named for name in names} <= defined


def test_weights_are_not_trained_in_float16(tmp_path: Path) -> None:
    words = problems(compose(["model=hf", f"model.path={save_model(tmp_path)}", "model.dtype=float16"]))
    assert any("model.dtype=float16: choose float32" in problem for problem in words)


def rows_of(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row] = ()) -> list[tuple[tuple[int, ...], ...]]:
    """Return the tokens of rows under a tokenizer."""
    renderer = Renderer(tokenizer, 99, "drop_pair")
    found = []
    for row in rows or (Row("What is the question?", " the cat", " that"), Row("", "the", "cat")):
        pair = renderer.render(row)
        assert isinstance(pair, TokenizedPair)
        found.append((pair.prompt_ids, *pair.completions))
    return found


def truncating(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)


def adding_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


def settings(**values: Any) -> Callable[[PreTrainedTokenizerFast], None]:
    def change(tokenizer: PreTrainedTokenizerFast) -> None:
        for name, value in values.items():
            setattr(tokenizer, name, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        truncating,
        adding_eos,
        settings(padding_side="left", truncation_side="left"),
        settings(model_max_length=4),
        settings(pad_token="<unk>"),
        settings(pad_token=None),
        settings(clean_up_tokenization_spaces=True),
    ],
)
def test_settings_of_a_tokenizer_for_other_uses_do_not_change_tokens(
    tmp_path: Path, change: Callable[[PreTrainedTokenizerFast], None]
) -> None:
    expected = rows_of(build("adds_bos"))
    tokenizer = build("adds_bos")
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert rows_of(as_in_file(AutoTokenizer.from_pretrained(tmp_path), tmp_path)) == expected


CHAT_ROW = Row(
    ({"role": "user", "content": "  \n\nWhat?  "},),
    ({"role": "assistant", "content": "\n The cat. "},),
    ({"role": "assistant", "content": "That."},),
)


def test_control_tokens_that_strip_white_space_strip_that_of_content_too() -> None:
    tokenizer = build("adds_bos", "{% for m in messages %}<unk>\n{{ m.content }}</s>\n{% endfor %}")
    tokens = [AddedToken(token, special=True, lstrip=True, rstrip=True) for token in ("<unk>", "</s>")]
    tokenizer.backend_tokenizer.add_special_tokens(tokens)
    [(prompt, chosen, rejected)] = rows_of(tokenizer, [CHAT_ROW])
    for answer, completion in ((CHAT_ROW.chosen, chosen), (CHAT_ROW.rejected, rejected)):
        whole = tokenizer.apply_chat_template([*CHAT_ROW.prompt, *answer], tokenize=False)  # type: ignore[misc]
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert (*prompt, *completion) == tuple(ids)


def test_a_template_is_chosen_by_its_name() -> None:
    default = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    with_tools = "{{ tools[0].name }}|" + default
    named = {"default": default, "tool_use": with_tools}
    row, tools = replace(CHAT_ROW, prompt=({"role": "user", "content": "p"},)), ({"name": "search"},)
    expected = rows_of(build("adds_bos", default), [row]) + rows_of(
        build("adds_bos", with_tools), [replace(row, tools=tools)]
    )
    tokenizer = build("adds_bos")
    tokenizer.chat_template = named
    assert rows_of(tokenizer, [row, replace(row, tools=tools)]) == expected
    tokenizer.chat_template = {"rag": default, "tool_use": with_tools}
    with pytest.raises(DataError, match=r"rag.*tool_use"):
        rows_of(tokenizer, [row])


def test_a_tokenizer_in_python_encodes_content_as_text() -> None:
    tokenizer = ByT5Tokenizer(chat_template="{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    assert not tokenizer.is_fast
    chosen, rejected = (({"role": "assistant", "content": text},) for text in ("a</s>b", "c"))
    text, chat = Row("p", "a</s>b", "c"), Row(({"role": "user", "content": "p"},), chosen, rejected)
    spelled = tuple(3 + byte for byte in b"a</s>b")
    assert Renderer(tokenizer, 99, "drop_pair").decode((*spelled, 1000, 1)) == "a</s>b"  # 1000 is no token
    assert rows_of(tokenizer, [text]) == [((3 + ord("p"),), (*spelled, 1), (3 + ord("c"), 1))]
    assert rows_of(tokenizer, [chat]) == [((3 + ord("p"), 1), (*spelled, 1), (3 + ord("c"), 1))]


def test_an_adapter_of_another_model_is_noted(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for name in ("one", "other"):
        save_model(tmp_path / name)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "one")
    adapter = tmp_path / "adapter"
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(str(adapter))
    noted = []
    for name in ("one", "other"):
        with collect_notes() as notes:
            with_given_adapter(LlamaForCausalLM.from_pretrained(tmp_path / name), str(adapter), is_trainable=False)
        noted.append(sorted(notes))
    assert noted == [[], ["notes/adapter_base"]]
