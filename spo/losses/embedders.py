"""Embeddings of prompts for losses that compare prompts."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch

from spo.bounds import PositiveInt

_WORD = re.compile(r"\w+")


class Embedder(Protocol):
    """A function from texts to vectors.

    Attributes:
        size: Numbers of a vector.
    """

    @property
    def size(self) -> int:
        """Return the numbers of a vector."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str] | None = None) -> list[tuple[float, ...]]:
        """Return a vector for each prompt.

        Args:
            prompts: Texts to embed.
            completions: Always ``None``: a prompt is embedded by itself.
        """


class HashedWords:
    """Counts of words and pairs of words, hashed to signed positions; it needs no model and is the same everywhere.

    A count c has the value 1 + log c. Two texts are alike as far as they share words.

    Args:
        size: Numbers of a vector.
    """

    def __init__(self, size: PositiveInt = 512) -> None:
        self.size = size

    def __call__(self, prompts: Sequence[str], completions: Sequence[str] | None = None) -> list[tuple[float, ...]]:
        """Return a vector of length 1 for each prompt; the first number alone for a text without words."""
        return list(map(self._embed, prompts))

    def _embed(self, text: str) -> tuple[float, ...]:
        words = _WORD.findall(text.casefold())
        counts: dict[str, int] = {}
        for key in (*words, *map(" ".join, zip(words, words[1:], strict=False))):
            counts[key] = counts.get(key, 0) + 1
        vector = [0.0] * self.size
        for key, count in counts.items():
            number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
            vector[(number >> 1) % self.size] += (1 if number & 1 else -1) * (1 + math.log(count))
        length = math.sqrt(sum(value * value for value in vector))
        if length == 0:
            return (1.0, *vector[1:])
        return tuple(value / length for value in vector)


class EncoderEmbedder:
    """Mean of the last hidden states of an encoder, such as sentence-transformers/all-MiniLM-L6-v2 (the paper's).

    Args:
        path: Hugging Face folder, or name on the hub.
        batch_size: Texts per forward pass.
        max_tokens: Most tokens of a text; the rest is cut.
    """

    def __init__(self, path: str, batch_size: PositiveInt = 64, max_tokens: PositiveInt = 256) -> None:
        from transformers import AutoConfig

        self.path, self.batch_size, self.max_tokens = path, batch_size, max_tokens
        try:
            self.size = int(AutoConfig.from_pretrained(path).hidden_size)
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"path={path}: not a Hugging Face encoder ({str(error).splitlines()[0]})") from error

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path), AutoModel.from_pretrained(self.path).eval()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str] | None = None) -> list[tuple[float, ...]]:
        """Return a vector for each prompt."""
        tokenizer, model = self._parts
        found: list[tuple[float, ...]] = []
        for first in range(0, len(prompts), self.batch_size):
            texts = list(prompts[first : first + self.batch_size])
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
            with torch.no_grad():
                states = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            found += map(tuple, ((states * mask).sum(1) / mask.sum(1)).tolist())
        return found
