"""Convert a checkpoint of llama2.c and its tokenizer into a Hugging Face folder that ``model=hf`` trains.

Usage::

    python examples/import_llama2c.py MODEL.bin TOKENIZER.bin OUT

MODEL.bin
    The legacy format (version 0) of https://github.com/karpathy/llama2.c: seven int32 numbers, then float32 arrays.
    Its models of stories are at https://huggingface.co/karpathy/tinyllamas.
TOKENIZER.bin
    The vocabulary that llama2.c reads: the length of the longest token, then score, length and bytes of each token.

llama2.c ends a text at the token that begins one, ``<s>``, and so does the folder. Models that end a text with
``</s>``, such as those of Meta, need ``--end-token 2``.
"""

from __future__ import annotations

import argparse
import itertools
import random
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from spo.errors import UserError, user_message

MAGIC_OF_LATER_VERSIONS = 0x616B3432
"""First number of a file of version 1 or later."""
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
"""Tokens 0, 1 and 2. The file has the last two with line breaks around them."""
BEGIN_TOKEN = 1
FIRST_BYTE_TOKEN = len(SPECIAL_TOKENS)
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Tokens of single bytes, which follow the special tokens."""
FIRST_TEXT_TOKEN = FIRST_BYTE_TOKEN + len(BYTE_TOKENS)
ROPE_THETA = 10000.0
"""Base of the rotary frequencies; llama2.c does not support another one."""
NORM_EPSILON = 1e-5
"""Constant of the norms; llama2.c does not support another one."""
SPACE = "\u2581"
"""Character that stands for a space in the tokens of sentencepiece, and so in the folder."""
NUM_CHECKED_TEXTS = 200


@dataclass(frozen=True)
class Header:
    """Sizes of a model, in the order of the file.

    Args:
        dim: Width of the hidden states.
        hidden_dim: Width of the feed-forward layers.
        n_layers: Number of layers.
        n_heads: Number of attention heads.
        n_kv_heads: Number of heads of keys and values.
        vocab_size: Number of tokens, negative for a model whose output matrix is not its embedding.
        seq_len: Largest number of tokens of a sequence.
    """

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int

    @property
    def num_tokens(self) -> int:
        return abs(self.vocab_size)

    @property
    def head_size(self) -> int:
        return self.dim // self.n_heads

    def is_possible(self) -> bool:
        """Return whether a model can have these sizes."""
        sizes = (self.dim, self.hidden_dim, self.n_layers, self.n_heads, self.n_kv_heads, self.num_tokens, self.seq_len)
        if min(sizes) < 1 or self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            return False
        return self.head_size % 2 == 0

    def arrays(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each array, in the order of the file."""
        layers, kv_dim = self.n_layers, self.n_kv_heads * self.head_size
        yield "embedding", (self.num_tokens, self.dim)
        yield "input_layernorm", (layers, self.dim)
        yield "self_attn.q_proj", (layers, self.dim, self.dim)
        yield "self_attn.k_proj", (layers, kv_dim, self.dim)
        yield "self_attn.v_proj", (layers, kv_dim, self.dim)
        yield "self_attn.o_proj", (layers, self.dim, self.dim)
        yield "post_attention_layernorm", (layers, self.dim)
        yield "mlp.gate_proj", (layers, self.hidden_dim, self.dim)
        yield "mlp.down_proj", (layers, self.dim, self.hidden_dim)
        yield "mlp.up_proj", (layers, self.hidden_dim, self.dim)
        yield "norm", (self.dim,)
        yield "rotary_tables", (2, self.seq_len, self.head_size // 2)
        if self.vocab_size < 0:
            yield "output", (self.num_tokens, self.dim)


class Vocabulary(NamedTuple):
    """Texts and merge scores of all tokens, by id, with plain spaces."""

    texts: list[str]
    scores: list[float]


def read_model(path: Path) -> tuple[Header, dict[str, np.ndarray]]:
    """Return the sizes and arrays of a model.

    Args:
        path: File in the legacy format of llama2.c.

    Raises:
        UserError: The file is not a model in this format, is cut off, or has a weight that is not finite.
    """
    with path.open("rb") as file:
        start = file.read(28)
    if len(start) < 28:
        raise UserError(
            f"{path}: a model of llama2.c begins with 28 bytes of sizes, but the file has {len(start)} bytes"
        )
    numbers = struct.unpack("<7i", start)
    if numbers[0] == MAGIC_OF_LATER_VERSIONS:
        raise UserError(
            f"{path}: the file has version {numbers[1]} of llama2.c's format, but only the legacy version 0 is "
            "supported; export the model again with `python export.py FILE --version 0`"
        )
    header = Header(*numbers)
    if not header.is_possible():
        raise UserError(
            f"{path}: not a model of llama2.c: no model has the sizes {header}, which its first bytes state"
        )
    expected = 28 + 4 * sum(int(np.prod(shape, dtype=object)) for _, shape in header.arrays())
    if (actual := path.stat().st_size) != expected:
        reason = (
            "cut off, so download it again" if actual < expected else "not a model of llama2.c in its legacy format"
        )
        raise UserError(
            f"{path}: a model with {header} takes {expected} bytes, but the file has {actual}; it is probably {reason}"
        )
    flat, start_of_array, arrays = np.memmap(path, "<f4", "r", offset=28), 0, {}
    for name, shape in header.arrays():
        end = start_of_array + int(np.prod(shape))
        arrays[name] = flat[start_of_array:end].reshape(shape)
        start_of_array = end
        if name != "rotary_tables" and not np.isfinite(arrays[name]).all():
            raise UserError(f"{path}: the weights of {name} are not all finite, so the file is damaged")
    return header, arrays


def read_vocabulary(path: Path, num_tokens: int) -> Vocabulary:
    """Return the tokens of a tokenizer.

    Args:
        path: Tokenizer file of llama2.c.
        num_tokens: Number of tokens of the model; the file does not state its own.

    Raises:
        UserError: The file is not a tokenizer of llama2.c with this number of tokens.
    """
    data = path.read_bytes()
    place = 4
    texts: list[str] = []
    scores: list[float] = []
    while place < len(data):
        token = f"{path}: token {len(texts)}"
        if place + 8 > len(data):
            raise UserError(f"{token} is cut off: the file is not a tokenizer of llama2.c, or is incomplete")
        score, length = struct.unpack_from("<fi", data, place)
        place += 8
        if not 0 <= length <= len(data) - place or not np.isfinite(score):
            raise UserError(
                f"{token} has {length} bytes and score {score}, but {len(data) - place} bytes follow: "
                "the file is not a tokenizer of llama2.c, or is incomplete"
            )
        try:
            texts.append(data[place : place + length].decode())
        except UnicodeDecodeError:
            raise UserError(f"{token} is not UTF-8 text, so the file is not a tokenizer of llama2.c") from None
        scores.append(score)
        place += length
    if len(texts) != num_tokens:
        raise UserError(
            f"{path}: the tokenizer has {len(texts)} tokens, but the model has {num_tokens}; "
            "use the tokenizer with which the model was trained"
        )
    if tuple(texts[FIRST_BYTE_TOKEN:FIRST_TEXT_TOKEN]) != BYTE_TOKENS:
        raise UserError(
            f"{path}: tokens 3 to 258 are not <0x00> to <0xFF>, which llama2.c needs for unknown characters"
        )
    texts[:FIRST_BYTE_TOKEN] = SPECIAL_TOKENS
    if len(set(texts)) < len(texts):
        text = next(text for place, text in enumerate(texts) if text in texts[:place])
        raise UserError(f"{path}: two tokens have the same text {text!r}, so a text does not have one encoding")
    return Vocabulary(texts, scores)


def convert_weights(header: Header, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the arrays of a model under the names, and in the rotary convention, of ``LlamaForCausalLM``."""
    weights = {"model.embed_tokens.weight": arrays["embedding"], "model.norm.weight": arrays["norm"]}
    if "output" in arrays:
        weights["lm_head.weight"] = arrays["output"]
    for name in [name for name in arrays if "." in name or name.endswith("layernorm")]:
        for layer, weight in enumerate(arrays[name]):
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = halves_from_pairs(weight, header.head_size)
            weights[f"model.layers.{layer}.{name}.weight"] = weight
    return {name: torch.from_numpy(np.array(weight, np.float32)) for name, weight in weights.items()}


def halves_from_pairs(weight: np.ndarray, head_size: int) -> np.ndarray:
    """Reorder the rows of each head: llama2.c rotates rows (0, 1), (2, 3), ..., transformers row i with i + half.

    Args:
        weight: ``(heads * head_size, dim)`` projection to queries or keys.
        head_size: Rows of a head.
    """
    pairs = weight.reshape(-1, head_size // 2, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def rotary_tables(header: Header) -> np.ndarray:
    """Return the ``(2, seq_len, head_size / 2)`` cosines and sines that llama2.c computes while it decodes."""
    frequencies = ROPE_THETA ** -(np.arange(0, header.head_size, 2) / header.head_size)
    angles = np.outer(np.arange(header.seq_len), frequencies)
    return np.stack([np.cos(angles), np.sin(angles)])


def encode(text: str, vocabulary: Vocabulary) -> list[int]:
    """Return the tokens of a text, without BOS, as llama2.c finds them.

    Each character becomes a token, or a token per byte where it is not one. Then llama2.c joins two adjacent tokens
    whose joint text is a token, until there are none: those with the highest score first, and of these the first.
    """
    ids_of = {token: place for place, token in enumerate(vocabulary.texts)}
    ids: list[int] = []
    for character in f" {text}" if text else "":
        known = ids_of.get(character)
        ids += [byte + FIRST_BYTE_TOKEN for byte in character.encode()] if known is None else [known]
    while True:
        joined = [ids_of.get(vocabulary.texts[a] + vocabulary.texts[b]) for a, b in itertools.pairwise(ids)]
        found = [(vocabulary.scores[token], -place, token) for place, token in enumerate(joined) if token is not None]
        if not found:
            return ids
        _, place, token = max(found)
        ids[-place : 2 - place] = [token]


def make_tokenizer(vocabulary: Vocabulary, max_length: int, end_token: int) -> PreTrainedTokenizerFast:
    """Return a fast tokenizer that encodes as llama2.c does and begins each text with BOS.

    Two cases differ, as in sentencepiece: the text of a special token is that token, unless the caller splits special
    tokens, and U+2581 is a space.

    Args:
        vocabulary: Tokens and their scores.
        max_length: Largest number of tokens of a sequence.
        end_token: Id of EOS, 1 or 2.
    """
    texts = [text.replace(" ", SPACE) for text in vocabulary.texts]
    ids_of = {text: place for place, text in enumerate(texts)}
    joinable = set(texts[FIRST_TEXT_TOKEN:])
    merges = []
    for token in sorted(range(FIRST_TEXT_TOKEN, len(texts)), key=lambda token: -vocabulary.scores[token]):
        splits = ((texts[token][:place], texts[token][place:]) for place in range(1, len(texts[token])))
        merges += [(left, right) for left, right in splits if left in joinable and right in joinable]
    tokenizer = Tokenizer(models.BPE(ids_of, merges, unk_token=SPECIAL_TOKENS[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    begin = SPECIAL_TOKENS[BEGIN_TOKEN]
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{begin} $A", f"{begin} $A $B", special_tokens=[(begin, BEGIN_TOKEN)]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL_TOKENS[0],
        bos_token=begin,
        eos_token=SPECIAL_TOKENS[end_token],
        pad_token=SPECIAL_TOKENS[padding_token(end_token)],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def padding_token(end_token: int) -> int:
    """Return the id of the special token that is neither BOS nor EOS."""
    return 2 if end_token == BEGIN_TOKEN else 0


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary) -> None:
    """Compare a tokenizer with :func:`encode` on random sequences of its tokens.

    Raises:
        UserError: A text has two encodings; this happens if tokens share a score.
    """
    rng = random.Random(0)
    for _ in range(NUM_CHECKED_TEXTS):
        text = "".join(rng.choices([*vocabulary.texts[FIRST_TEXT_TOKEN:], "\n", "é", "語"], k=rng.randint(1, 20)))
        expected, actual = encode(text, vocabulary), tokenizer.encode(text, add_special_tokens=False)
        if SPACE not in text and actual != expected:
            raise UserError(
                f"the tokens cannot be expressed as a fast tokenizer: {text!r} has the tokens {expected} in llama2.c, "
                f"but {actual} in the folder; do tokens share a score?"
            )


def convert(model: Path, tokenizer: Path, out: Path, end_token: int = BEGIN_TOKEN) -> None:
    """Write a Hugging Face folder.

    Args:
        model: Model of llama2.c.
        tokenizer: Tokenizer of llama2.c.
        out: Folder to create.
        end_token: Id of the token that ends a text: 1 for ``<s>``, 2 for ``</s>``.

    Raises:
        UserError: A file is not as described above, or the folder has files already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; name another one or move it away")
    for path in (model, tokenizer):
        if not path.is_file():
            raise UserError(f"{path} is not a file; give the paths of a model and of a tokenizer of llama2.c")
    header, arrays = read_model(model)
    vocabulary = read_vocabulary(tokenizer, header.num_tokens)
    fast = make_tokenizer(vocabulary, header.seq_len, end_token)
    check_tokenizer(fast, vocabulary)
    if not np.allclose(arrays["rotary_tables"], rotary_tables(header), atol=1e-3):
        print(
            f"note: {model} has rotary tables of another base than {ROPE_THETA:g}; llama2.c ignores them, and so do we"
        )
    special_ids: dict[str, Any] = {
        "bos_token_id": BEGIN_TOKEN,
        "eos_token_id": end_token,
        "pad_token_id": padding_token(end_token),
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=header.num_tokens,
        hidden_size=header.dim,
        intermediate_size=header.hidden_dim,
        num_hidden_layers=header.n_layers,
        num_attention_heads=header.n_heads,
        num_key_value_heads=header.n_kv_heads,
        max_position_embeddings=header.seq_len,
        rms_norm_eps=NORM_EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=header.vocab_size > 0,
        **special_ids,
    )
    out.mkdir(parents=True, exist_ok=True)
    save_file(convert_weights(header, arrays), out / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(out)
    GenerationConfig(**special_ids).save_pretrained(out)
    fast.save_pretrained(out)
    print(f"{out}: {header.n_layers} layers of width {header.dim}, {header.num_tokens} tokens; train it with")
    print(f"  spo train model=hf model.path={out}")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description="Convert a checkpoint of llama2.c into a Hugging Face folder.")
    parser.add_argument("model", type=Path, metavar="MODEL.bin", help="model in the legacy format of llama2.c")
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER.bin", help="tokenizer of llama2.c")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument(
        "--end-token",
        type=int,
        choices=(1, 2),
        default=BEGIN_TOKEN,
        help="id of the token that ends a text: 1 for <s> as in llama2.c (default), 2 for </s>",
    )
    arguments = parser.parse_args(words)
    try:
        convert(arguments.model, arguments.tokenizer, arguments.out, arguments.end_token)
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
