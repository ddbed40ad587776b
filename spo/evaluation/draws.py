"""Completions of a model on the evaluation prompts, with what both models say about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from spo.data import EvalPrompt
from spo.evaluation.settings import EvaluationSettings
from spo.ops import (
    Logits,
    completion_logits,
    completion_targets,
    sum_per_sequence,
    token_entropy,
    token_kl,
    token_logps,
)
from spo.ops.logps import DeferredLogits, at_least_float32
from spo.sampling import derive_seed, sample
from spo.types import Sequences


@dataclass(frozen=True)
class Draws:
    """Completions, ``samples_per_prompt`` of the first prompt, then of the next.

    Log-probs, entropies and the KL are of the distributions at the temperature of the sampling, for both models.

    Attributes:
        texts: without their end-of-text.
        tokens: their lengths, end-of-text included.
        logps: log-probs under the model that drew them, nats.
        entropy: sums over tokens of its next-token entropies, nats.
        other_logps: log-probs under the other model, where there is one.
        kl: sums over tokens of KL(model || other model), nats.
    """

    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    other_logps: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


@torch.no_grad()
def draw(
    model: nn.Module,
    stage: str,
    prompts: Sequence[EvalPrompt],
    settings: EvaluationSettings,
    tokenizer: PreTrainedTokenizerBase,
    decode: Callable[[Sequence[int]], str],
    on_progress: Callable[[int], None] = lambda _: None,
    other: nn.Module | None = None,
) -> Draws:
    """Draws from ``model`` and scores with it and ``other``.

    A completion follows from the weights, ``settings.seed``, ``stage``, its prompt and its number: it is the same for
    any ``batch_size``, and for any other prompts.
    """
    wanted = [(prompt, i) for prompt in prompts for i in range(settings.samples_per_prompt)]
    found = Draws()

    def logits_of(scored: nn.Module, sequences: Sequences) -> Logits:
        logits = completion_logits(scored, sequences, max_logits=settings.max_logits)
        return logits if settings.temperature == 1 else _divided(logits, settings.temperature)

    for first in range(0, len(wanted), settings.batch_size):
        chunk = wanted[first : first + settings.batch_size]
        sequences = sample(
            model,
            [prompt.ids for prompt, _ in chunk],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seeds=[derive_seed("evaluation", stage, settings.seed, prompt.prompt_id, i) for prompt, i in chunk],
            sampler=settings.sampler,
        )
        logits, targets = logits_of(model, sequences), completion_targets(sequences)
        found.texts.extend(map(decode, sequences.completions()))
        found.tokens.extend(sequences.completion_length.tolist())
        found.logps.extend(sum_per_sequence(token_logps(logits, targets), sequences).tolist())
        found.entropy.extend(sum_per_sequence(token_entropy(logits), sequences).tolist())
        if other is not None:
            other_logits = logits_of(other, sequences)
            found.other_logps.extend(sum_per_sequence(token_logps(other_logits, targets), sequences).tolist())
            found.kl.extend(sum_per_sequence(token_kl(logits, other_logits), sequences).tolist())
        on_progress(len(chunk))
    return found


def _divided(logits: Logits, temperature: float) -> Logits:
    if isinstance(logits, DeferredLogits):
        head = logits.head
        return replace(logits, head=lambda states: at_least_float32(head(states)) / temperature)
    return at_least_float32(logits) / temperature  # widened first: the sampler does not divide in half precision
