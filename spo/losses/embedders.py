"""Embeddings of prompts for losses that compare prompts."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

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
        for key in (*words, *map(" ".join, pairwise(words))):
            counts[key] = counts.get(key, 0) + 1
        vector = [0.0] * self.size
        for key, count in counts.items():
            number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
            vector[(number >> 1) % self.size] += (1 if number & 1 else -1) * (1 + math.log(count))
        length = math.sqrt(sum(value * value for value in vector))
        if length == 0:
            return (1.0, *vector[1:])
        return tuple(value / length for value in vector)
