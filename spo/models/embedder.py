"""Embeddings of prompts by an encoder, for losses that compare prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from spo.bounds import PositiveInt


class EncoderEmbedder:
    """Mean of the last hidden states of an encoder, such as sentence-transformers/all-MiniLM-L6-v2 (the paper's).

    Args:
        path: Hugging Face folder, or name on the hub.
        batch_size: Texts per forward pass.
        max_tokens: Most tokens of a text, not more than the encoder reads; the rest is cut.
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
        longest = min(self.max_tokens, tokenizer.model_max_length, model.config.max_position_embeddings)
        found: list[tuple[float, ...]] = []
        for first in range(0, len(prompts), self.batch_size):
            texts = list(prompts[first : first + self.batch_size])
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            with torch.no_grad():
                states = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            found += map(tuple, ((states * mask).sum(1) / mask.sum(1)).tolist())
        return found
