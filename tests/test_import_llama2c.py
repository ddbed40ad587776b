"""Models of llama2.c as Hugging Face folders: logits, greedy decoding, tokens, and files that are something else."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.import_llama2c import main

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("SPO_DATA_DIR", ROOT / "../shared/data"))
PIECES = {" t": -1.0, "he": -2.0, " the": -3.0, "hat": -4.0, "th": -5.0, "at": -0.5, "aaa": -7.0, "aa": -6.0}
"""Tokens of several characters, and the order in which they are joined."""
CHARACTERS = " thea\u00e9"
TOKENS = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, *CHARACTERS]


class Sizes(NamedTuple):
    """The first seven numbers of a file."""

    dim: int = 16
    hidden_dim: int = 20
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    vocab_size: int = len(TOKENS)
    seq_len: int = 32


SIZES = Sizes()


def arrays_of(sizes: Sizes, seed: int = 0) -> list[np.ndarray]:
    """Return random arrays of a model, in the order of the file."""
    rng = np.random.default_rng(seed)
    d, f, n, vocab = sizes.dim, sizes.hidden_dim, sizes.n_layers, abs(sizes.vocab_size)
    head = d // sizes.n_heads
    kv = sizes.n_kv_heads * head
    shapes: list[tuple[int, ...]] = [(vocab, d), (n, d), (n, d, d), (n, kv, d), (n, kv, d), (n, d, d), (n, d)]
    shapes += [(n, f, d), (n, d, f), (n, f, d), (d,), (sizes.seq_len, head // 2), (sizes.seq_len, head // 2)]
    shapes += [(vocab, d)] if sizes.vocab_size < 0 else []
    return [rng.normal(scale=0.6, size=shape).astype("<f4") for shape in shapes]


def write_model(path: Path, sizes: Sizes, seed: int = 0) -> list[np.ndarray]:
    arrays = arrays_of(sizes, seed)
    path.write_bytes(struct.pack("<7i", *sizes) + b"".join(array.tobytes() for array in arrays))
    return arrays


def write_tokenizer(path: Path, tokens: Sequence[str | bytes] = TOKENS) -> Path:
    data = struct.pack("<i", 10)
    for token in tokens:
        raw = token if isinstance(token, bytes) else token.encode()
        data += struct.pack("<fi", PIECES.get(raw.decode(errors="replace"), 0.0), len(raw)) + raw
    path.write_bytes(data)
    return path


def logits_of_llama2c(sizes: Sizes, arrays: list[np.ndarray], ids: Sequence[int]) -> np.ndarray:
    """Return the ``(T, V)`` logits as llama2.c defines them, in float64: it rotates adjacent pairs of a head."""
    emb, norm1, wq, wk, wv, wo, norm2, w1, w2, w3, final, _, _, *out = (array.astype(np.float64) for array in arrays)
    head = sizes.dim // sizes.n_heads
    steps = np.arange(len(ids))
    turns = np.exp(1j * np.outer(steps, 10000.0 ** (-np.arange(0, head, 2) / head)))[:, None]

    def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def rotated(x: np.ndarray) -> np.ndarray:
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = emb[list(ids)]
    for layer in range(sizes.n_layers):
        h = normed(x, norm1[layer])
        q = rotated((h @ wq[layer].T).reshape(len(ids), sizes.n_heads, head))
        k = rotated((h @ wk[layer].T).reshape(len(ids), sizes.n_kv_heads, head))
        v = (h @ wv[layer].T).reshape(len(ids), sizes.n_kv_heads, head)
        heads = []
        for i in range(sizes.n_heads):
            j = i // (sizes.n_heads // sizes.n_kv_heads)
            scores = np.where(steps[:, None] >= steps, q[:, i] @ k[:, j].T / np.sqrt(head), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, j])
        x = x + np.concatenate(heads, -1) @ wo[layer].T
        h = normed(x, norm2[layer])
        gate = h @ w1[layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w3[layer].T)) @ w2[layer].T
    return normed(x, final) @ (out[0] if out else emb).T


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def converted(tmp_path: Path) -> Any:
    """Return a function that writes a model and its tokenizer, and converts them with further options."""

    def convert(sizes: Sizes = SIZES, *options: str) -> tuple[Path, list[np.ndarray]]:
        arrays = write_model(tmp_path / "model.bin", sizes)
        tokenizer = write_tokenizer(tmp_path / "tokenizer.bin")
        assert main([str(tmp_path / "model.bin"), str(tokenizer), str(tmp_path / "out"), *options]) == 0
        return tmp_path / "out", arrays

    return convert


@pytest.mark.parametrize(
    "sizes",
    [SIZES, Sizes(vocab_size=-len(TOKENS)), Sizes(n_kv_heads=4), Sizes(n_kv_heads=1, n_layers=1)],
    ids=["shared", "output", "as many keys", "one key"],
)
def test_logits_are_those_of_llama2c(sizes: Sizes, converted: Any) -> None:
    folder, arrays = converted(sizes)
    model, _ = loaded(folder, torch.float64)
    ids = [1, *np.random.default_rng(1).integers(3, len(TOKENS), 20).tolist()]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    expected = logits_of_llama2c(sizes, arrays, ids)
    assert expected.std() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert model.config.tie_word_embeddings is (sizes.vocab_size > 0)


def test_tokens_are_those_of_llama2c(converted: Any) -> None:
    folder, _ = converted()
    _, tokenizer = loaded(folder)
    ids_of = {token: place for place, token in enumerate(TOKENS)}

    def ids(*tokens: str | int) -> list[int]:
        return [token + 3 if isinstance(token, int) else ids_of[token] for token in tokens]

    cases = {
        "the": ids(" the"),
        "that": ids(" t", "hat"),  # "at" is joined before "th", which then is not there anymore
        "hthe": ids(" ", "h", "t", "he"),  # "he" comes before "th"
        "aaaa": ids(" ", "aa", "aa"),  # "aa" comes before "aaa"
        "aaa": ids(" ", "aaa"),
        " t": ids(" ", " t"),
        "a\n": ids(" ", "a", 10),
        "\u00e9\u00e8": ids(" ", "\u00e9", 0xC3, 0xA8),
        "t\U0001f600": ids(" t", 0xF0, 0x9F, 0x98, 0x80),
        "": [],
    }
    for text, expected in cases.items():
        assert tokenizer.encode(text) == [1, *expected], text
        assert tokenizer.decode(expected) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (1, 2, 32)


def test_another_end_token(converted: Any) -> None:
    folder, _ = converted(SIZES, "--end-token", "2")
    model, tokenizer = loaded(folder)
    for where in (tokenizer, model.config, model.generation_config):
        assert (where.bos_token_id, where.eos_token_id, where.pad_token_id) == (1, 2, 0)


CORRECT = struct.pack("<7i", *SIZES) + b"".join(array.tobytes() for array in arrays_of(SIZES))
NOT_FINITE = CORRECT[:28] + struct.pack("<f", float("nan")) + CORRECT[32:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with 28 bytes of sizes, but the file has 0 bytes"),
        (CORRECT[:-4], f"takes {len(CORRECT)} bytes, but the file has {len(CORRECT) - 4}; it is probably cut off"),
        (CORRECT + b"1234", f"takes {len(CORRECT)} bytes, but the file has {len(CORRECT) + 4}"),
        (struct.pack("<7i", *Sizes(dim=17)) + CORRECT[28:], "not a model of llama2.c: no model has the sizes"),
        (struct.pack("<7i", *Sizes(n_kv_heads=3)) + CORRECT[28:], "not a model of llama2.c: no model has the sizes"),
        (struct.pack("<7i", *Sizes(n_layers=-1)) + CORRECT[28:], "not a model of llama2.c: no model has the sizes"),
        (b"PK\x03\x04" + bytes(100), "not a model of llama2.c"),
        (struct.pack("<2i", 0x616B3432, 2) + bytes(248), "has version 2 of llama2.c's format"),
        (NOT_FINITE, "the weights of embedding are not all finite"),
    ],
)
def test_a_model_file_that_is_something_else(
    data: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.bin").write_bytes(data)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.bin")
    assert main([str(tmp_path / "model.bin"), str(tokenizer), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'model.bin'}") and not (tmp_path / "out").exists()
    assert message in failure(tmp_path, capsys)


def failure(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message about the two files of a folder."""
    assert main([str(folder / name) for name in ("model.bin", "tokenizer.bin", "out")]) == 1
    assert not (folder / "out").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "cut", "message"),
    [
        (TOKENS[:-1], 0, f"the tokenizer has {len(TOKENS) - 1} tokens, but the model has {len(TOKENS)}"),
        (TOKENS, 1, f"token {len(TOKENS) - 1} has 2 bytes and score 0.0, but 1 bytes follow"),
        (TOKENS, 5, f"token {len(TOKENS) - 1} is cut off"),
        ([*TOKENS[:-1], b"\xff"], 0, f"token {len(TOKENS) - 1} is not UTF-8 text"),
        ([*TOKENS[:-1], "he"], 0, "two tokens have the same text 'he'"),
        ([*TOKENS[:3], *TOKENS[4:], "more"], 0, "tokens 3 to 258 are not <0x00> to <0xFF>"),
    ],
)
def test_a_tokenizer_file_that_is_something_else(
    tokens: Sequence[str | bytes], cut: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model.bin", SIZES)
    file = write_tokenizer(tmp_path / "tokenizer.bin", tokens)
    file.write_bytes(file.read_bytes()[: file.stat().st_size - cut])
    assert message in failure(tmp_path, capsys)


def test_tokens_that_share_a_score_are_not_converted_to_other_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in PIECES:
        monkeypatch.setitem(PIECES, token, -1.0)
    write_model(tmp_path / "model.bin", SIZES)
    write_tokenizer(tmp_path / "tokenizer.bin")
    assert "cannot be expressed as a fast tokenizer" in failure(tmp_path, capsys)


def test_missing_files_and_a_folder_with_files(
    tmp_path: Path, converted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = converted()
    words = [str(tmp_path / name) for name in ("model.bin", "tokenizer.bin", "out")]
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert main(words) == 1 and "out exists and is not an empty folder" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    assert main([words[0], str(tmp_path / "nothing.bin"), str(tmp_path / "new")]) == 1
    assert "nothing.bin is not a file" in capsys.readouterr().err


def test_rotary_tables_of_another_base_are_noted(converted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    converted()  # the tables of these models are random
    assert "has rotary tables of another base than 10000" in capsys.readouterr().out


# --- a published model --------------------------------------------------------------------------------------------

TEXTS = [
    "",
    "Once upon a time, there was a little girl named Lily.",
    " leading and trailing spaces ",
    "many    spaces, a\ttab\nand\n\ntwo lines\r\n",
    "Señor Müller 语言 naïve — “quotes” 😀🏳️‍🌈 \u00a0 e\u0301",
    "0123456789 !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ \x7f\x01",
    "THE CAT AND THE DOG",
]


def test_stories260k_is_the_published_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, published = DATA / "llama2c", DATA / "stories260K"
    if not (files.exists() and published.exists()):
        pytest.skip("no SPO_DATA_DIR")
    assert main([str(files / "stories260K.bin"), str(files / "tok512.bin"), str(tmp_path / "out")]) == 0
    assert "note" not in capsys.readouterr().out
    (ours, our_tokenizer), (theirs, their_tokenizer) = loaded(tmp_path / "out"), loaded(published)
    for text in TEXTS:
        assert our_tokenizer.encode(text) == their_tokenizer.encode(text)
        assert our_tokenizer.decode(our_tokenizer.encode(text), skip_special_tokens=True) == text
    for prompt in ("", "Tom and his dog", "“Hello,” said Zoë.\n"):
        ids = their_tokenizer(prompt, return_tensors="pt").input_ids
        options: dict[str, Any] = {"max_new_tokens": 120, "do_sample": False}
        stories = [model.generate(ids, **options)[0] for model in (ours, theirs)]
        assert len(stories[1]) > 100 and stories[0].tolist() == stories[1].tolist()
        with torch.no_grad():
            torch.testing.assert_close(
                ours(stories[1][None]).logits, theirs(stories[1][None]).logits, atol=1e-4, rtol=0
            )
