"""Embedders of prompts: the same numbers everywhere, and an encoder against its own forward pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from spo.data import Row
from spo.losses import DataNeeds, HashedWords, RPOLoss
from spo.losses.embedders import Embedder
from spo.models import EncoderEmbedder
from tests.data.test_needs import prepared

TEXTS = ["the fox ran.", "a dog", "the fox ran the fox ran the dog sat. a dog ran."]
LONGEST = 24


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "ran", "a", "dog", "sat", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    library: Any = transformers  # Its exports do not name the class of the tokenizer.
    library.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LONGEST,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def cosine(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    return torch.cosine_similarity(torch.tensor(one), torch.tensor(other), dim=0).item()


def test_hashed_words_are_the_same_everywhere() -> None:
    [vector] = HashedWords(8)(["The fox, the fox!"])
    # Twice: the, fox, "the fox". Once: "fox the". Their digests give the places and signs.
    twice = 1 + math.log(2)
    wanted = [twice, 0, 0, twice, 0, -1, 0, -twice]
    assert vector == pytest.approx([value / math.hypot(*wanted) for value in wanted], abs=1e-12)


def test_hashed_words_compare_texts_by_their_words() -> None:
    fox, other_case, dog, empty = HashedWords(4096)(["the fox ran", "The FOX ran!", "a dog", "..."])
    assert fox == other_case and cosine(fox, dog) == pytest.approx(0, abs=1e-6)
    assert empty == (1.0, *[0.0] * 4095)


def test_encoder_is_the_mean_of_its_last_states(encoder: Path) -> None:
    embedder = EncoderEmbedder(str(encoder), batch_size=2)
    found = embedder(TEXTS)
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(torch.tensor(vector), states.mean(0), rtol=1e-5, atol=1e-6)
    assert embedder.size == 16 and EncoderEmbedder(str(encoder))(TEXTS[::-1])[0] == pytest.approx(found[2], abs=1e-6)


def test_encoder_cuts_texts_that_it_cannot_read(encoder: Path) -> None:
    begin, long = EncoderEmbedder(str(encoder))(["fox " * (LONGEST - 2), "fox " * 300])
    assert long == pytest.approx(begin, abs=1e-6)
    short, same = EncoderEmbedder(str(encoder), max_tokens=4)(["fox fox dog dog", "fox fox ran"])
    assert short == pytest.approx(same, abs=1e-6)


def test_folder_that_is_not_an_encoder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a Hugging Face encoder"):
        EncoderEmbedder(str(tmp_path))


def test_what_is_not_an_embedder_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"embedder must be a function with a size, .* got 'words'"):
        RPOLoss(embedder="words")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["words", "encoder"])
def test_rows_without_the_column_get_the_embedding_of_their_prompt(kind: str, encoder: Path) -> None:
    embedder: Embedder = HashedWords(16) if kind == "words" else EncoderEmbedder(str(encoder))
    needs = DataNeeds.of(RPOLoss(embedder=embedder))
    given = [0.5] * 16
    rows = [
        Row("the fox ran", " yes", " no"),
        Row("a dog sat", " yes", " no", columns={"prompt_embedding": given}),
    ]
    made = {pair.prompt_text: pair.features["prompt_embedding"] for pair in prepared(rows, needs).train}
    assert made == {"the fox ran": embedder(["the fox ran"])[0], "a dog sat": tuple(given)}
