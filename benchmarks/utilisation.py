"""Model FLOPs of a step, counted from the shape of the model, and the rate of matrix products that a device reaches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from benchmarks.workloads import now
from spo.types import Group


@dataclass(frozen=True)
class Work:
    """What a forward pass has to do.

    Attributes:
        tokens: through the blocks.
        predicted: tokens that the language-model head runs for.
        places: pairs of a query and a key that attention multiplies.
    """

    tokens: int
    predicted: int
    places: int

    @classmethod
    def of(cls, groups: Iterable[Group]) -> Work:
        """Prompts once, completions after them, logits of completions alone, and only what causal attention sees."""
        tokens = predicted = places = 0
        for group in groups:
            tokens += group.length
            predicted += sum(group.completions)
            places += group.prompt * (group.prompt + 1) // 2
            places += sum(n * group.prompt + n * (n + 1) // 2 for n in group.completions)
        return cls(tokens, predicted, places)


def forward_flops(config: LlamaConfig, work: Work) -> int:
    """FLOPs of the matrix products of a forward pass; a backward pass with all gradients has twice as many."""
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    block = 2 * hidden * width + 2 * hidden * keys + 3 * hidden * config.intermediate_size
    weights = config.num_hidden_layers * block * work.tokens + hidden * config.vocab_size * work.predicted
    return 2 * weights + 4 * config.num_hidden_layers * width * work.places


def matmul_rate(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """FLOPs per second of square bfloat16 matrix products, measured."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    started = now()
    for _ in range(repeats):
        a @ b
    return 2 * size**3 * repeats / (now() - started)
