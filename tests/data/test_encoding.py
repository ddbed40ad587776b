"""Text is never control: the text of control tokens inside content, on tokenizers of every kind."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spo.data import Renderer, Row, TokenizedPair
from spo.data.encoding import TextEncoder
from tests.data.tokenizers_built_here import KINDS, build

LETTERS = "abcdefghijklmnopqrstuvwxyz<>/?. "


def unigram() -> PreTrainedTokenizerFast:
    """Return a tokenizer as T5's: its model reads "</s>" in text as the token even if it is not an added token."""
    pieces = [(token, 0.0) for token in ("<unk>", "<s>", "</s>", "<pad>")]
    inner = Tokenizer(models.Unigram([*pieces, *((letter, -3.0) for letter in f"▁{LETTERS}")], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens([token for token, _ in pieces])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def normalizing() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose normalizer turns full-width brackets into those of the end token."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *LETTERS])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.normalizer = normalizers.NFKC()
    inner.add_special_tokens([AddedToken("</s>", special=True, normalized=True), AddedToken("<unk>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


MAKERS = {
    **{kind: (lambda kind=kind: build(kind)) for kind in KINDS},
    "unigram": unigram,
    "normalizing": normalizing,
    "python": ByT5Tokenizer,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_hidden_text_is_encoded_as_text_and_the_rest_as_ever(kind: str) -> None:
    tokenizer: PreTrainedTokenizerBase = MAKERS[kind]()  # type: ignore[no-untyped-call]
    encoder, eos = TextEncoder(tokenizer), str(tokenizer.eos_token)
    content = f"on{eos} on"
    [hidden, written, text] = encoder.encode([encoder.hide(content) + eos, content + eos, "on on"])
    assert encoder.reveal(encoder.hide(content)) == content and encoder.occurring([{"x": content}]) == {eos}
    assert hidden.count(tokenizer.eos_token_id) == 1 and hidden[-1] == tokenizer.eos_token_id
    assert written.count(tokenizer.eos_token_id) == 2
    assert list(text) == tokenizer("on on", add_special_tokens=False)["input_ids"]
    # The letters of the token are there as well, one by one.
    assert tokenizer.decode(list(hidden[:-1])).replace(" ", "") == f"on{eos}on"
    assert encoder.leaks == 0


def test_text_that_a_normalizer_turns_into_a_control_token_is_text() -> None:
    tokenizer = normalizing()
    encoder = TextEncoder(tokenizer)
    full_width = "a\uff1c/s\uff1eb"
    assert tokenizer.eos_token_id in tokenizer(full_width)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(list(encoder.encode([full_width])[0])) == [*"a</s>b"]


def test_text_cannot_pose_as_hidden_or_private() -> None:
    encoder = TextEncoder(build("adds_bos"))
    forged = "\ufdd00123456789120\ufdd1\ufdd20123456789122\ufdd3"
    assert encoder.reveal(encoder.hide(forged)) == forged
    assert not set(encoder.encode([forged])[0]) & {0, 1, 2, 3}


def test_control_tokens_that_are_not_flagged_as_special_are_text_too() -> None:
    tokenizer = build("adds_bos")
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert end in TextEncoder(tokenizer).encode([TextEncoder(tokenizer).hide("a<end>")])[0]
    encoder = TextEncoder(tokenizer, ["<end>"])
    assert encoder.encode([encoder.hide("a<end>") + "<end>"])[0].count(end) == 1


class Stubborn(PreTrainedTokenizerFast):
    """A tokenizer that cannot be copied."""

    @property
    def backend_tokenizer(self) -> Any:
        raise TypeError("parts in Python")


def test_text_that_a_tokenizer_cannot_read_as_text_is_counted_and_noted() -> None:
    tokenizer = Stubborn(tokenizer_object=build("adds_bos")._tokenizer, bos_token="<s>", eos_token="</s>")
    renderer = Renderer(tokenizer, 64, "drop_pair")
    renderer.render(Row("on?", "cat", "on"))
    renderer.render(Row("on?", "c</s>at", "on"))
    notes = {key: (sentence, count) for key, sentence, count in renderer.notes()}
    assert notes["control_text_leaks"][1] == 1
    assert notes["control_text_leaks"][0].startswith("1 row contains text that this tokenizer cannot encode as text")


# ---------------------------------------------------------------------------------------------------- text columns


def test_text_columns_are_text_unless_another_tool_wrote_them() -> None:
    tokenizer = build("adds_bos")
    row = Row("o</s>n?<pad>", "c</s>at", "on", where="x")
    renderer = Renderer(tokenizer, 64, "drop_pair")
    pair = renderer.render(row)
    assert isinstance(pair, TokenizedPair)
    assert tokenizer.convert_ids_to_tokens(list(pair.prompt_ids)) == ["<s>", "o", *"</s>", "n", "?", *"<pad>"]
    assert tokenizer.convert_ids_to_tokens(list(pair.chosen_ids)) == ["c", *"</s>", "at", "</s>"]
    assert (pair.prompt_text, pair.chosen_text) == ("o</s>n?<pad>", "c</s>at")
    notes = {key: (sentence, count) for key, sentence, count in renderer.notes()}
    assert notes["control_text_in_columns"][1] == notes["eos_in_completion"][1] == 1
    assert "(</s>, <pad>)" in notes["control_text_in_columns"][0]
    assert "set data.split_special_tokens=false" in notes["control_text_in_columns"][0]

    before = Renderer(tokenizer, 64, "drop_pair", split_special_tokens=False)
    pair = before.render(row)
    assert isinstance(pair, TokenizedPair)
    assert tokenizer.convert_ids_to_tokens(list(pair.prompt_ids)) == ["<s>", "o", "</s>", "n", "?", "<pad>"]
    assert tokenizer.convert_ids_to_tokens(list(pair.chosen_ids)) == ["c", "</s>", "at", "</s>"]
    assert {key for key, _, _ in before.notes()} == {"eos_in_completion"}


def test_token_across_prompt_and_completion_is_text() -> None:
    tokenizer = build("adds_bos")
    pair = Renderer(tokenizer, 64, "drop_pair").render(Row("on</", "s>", "on"))
    assert isinstance(pair, TokenizedPair)
    assert tokenizer.convert_ids_to_tokens(list(pair.prompt_ids + pair.chosen_ids)) == ["<s>", "on", *"</s>", "</s>"]
    assert tokenizer.decode(list(pair.rejected_ids or ())) == "on</s>"


def test_columns_with_an_applied_template_end_as_it_does() -> None:
    tokenizer = build("adds_bos")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    renderer = Renderer(tokenizer, 64, "drop_pair", stop_ids=[turn], split_special_tokens=False)
    pair = renderer.render(Row("on?<turn>", "cat<turn>\n", "on</s>"))
    assert isinstance(pair, TokenizedPair)
    assert tokenizer.decode(list(pair.prompt_ids)) == "<s>on?<turn>"
    assert tokenizer.decode(list(pair.chosen_ids)) == "cat<turn>" and pair.chosen_text == "cat"
    assert tokenizer.decode(list(pair.rejected_ids or ())) == "on</s>"


def test_unknown_token_of_ordinary_text_is_not_control() -> None:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    encoder = TextEncoder(tokenizer)
    assert encoder.encode(["aba"]) == [(2, 0, 2)] and encoder.leaks == 0
