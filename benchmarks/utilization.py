"""Model FLOPs of a step from the shape of the model, and the measured rate of matrix products of a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from benchmarks.workloads import now
from spo.forward.packing import Group, pack
from spo.types import Sequences


@dataclass(frozen=True)
class Work:
    """The work of a forward pass.

    Attributes:
        tokens: Tokens that pass through the blocks.
        predicted: Tokens for which the language-model head runs.
        places: Pairs of a query and a key that attention multiplies.
    """

    tokens: int
    predicted: int
    places: int

    @classmethod
    def of(cls, groups: Iterable[Group]) -> Work:
        """Count each prompt once, logits of completions alone, and only the places that causal attention sees."""
        tokens = predicted = places = 0
        for group in groups:
            tokens += group.length
            predicted += sum(group.completions)
            places += group.prompt * (group.prompt + 1) // 2
            places += sum(n * group.prompt + n * (n + 1) // 2 for n in group.completions)
        return cls(tokens, predicted, places)


def forward_flops(config: LlamaConfig, work: Work) -> int:
    """Return the FLOPs of the matrix products of a forward pass; a backward pass with all gradients has twice as many.

    Args:
        config: Shape of the model.
        work: Work of the pass.
    """
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    hidden, width = config.hidden_size, config.num_attention_heads * head
    keys = (config.num_key_value_heads or config.num_attention_heads) * head
    block = 2 * hidden * width + 2 * hidden * keys + 3 * hidden * config.intermediate_size
    weights = config.num_hidden_layers * block * work.tokens + hidden * config.vocab_size * work.predicted
    return 2 * weights + 4 * config.num_hidden_layers * width * work.places


def step_flops(config: LlamaConfig, pairs: Work, *, reference: bool, frozen: bool = False) -> int:
    """Return the model FLOPs of a preference step.

    Args:
        config: Shape of the model.
        pairs: Work of a forward pass over the pairs of the step.
        reference: Whether the reference scores the pairs, which is a forward pass more.
        frozen: Whether the weights are frozen under an adapter: half of the backward pass is their gradients.
    """
    backward = 1 if frozen else 2
    return (1 + backward + reference) * forward_flops(config, pairs)


def real_work(sequences: Iterable[Sequences]) -> Work:
    """Return the work of a forward pass over the real tokens of some batches, with each prompt once."""
    return Work.of(group for batch in sequences for group in groups_of(batch))


def groups_of(sequences: Sequences) -> tuple[Group, ...]:
    """Return the groups of the row that the sequences are packed into when they share prompts."""
    packed = pack(sequences, share_prompts=True).packed
    assert packed is not None
    return packed.groups.members


def matmul_rate(device: torch.device, size: int | None = None, repeats: int = 20) -> float:
    """Measure the FLOPs per second of square bfloat16 matrix products.

    Args:
        device: Device to measure.
        size: Rows and columns, by default enough to keep an accelerator busy, and few on a CPU.
        repeats: Number of products that are timed.
    """
    size = size or (512 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    started = now()
    for _ in range(repeats):
        a @ b
    return 2 * size**3 * repeats / (now() - started)
