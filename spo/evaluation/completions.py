"""Completions of a model on the evaluation prompts, with what both models say about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spo.batching import by_length, split_by_tokens
from spo.data import EvalPrompt
from spo.evaluation.settings import EvaluationSettings
from spo.forward.speed import Speed
from spo.ops import completion_targets, sum_per_sequence, token_entropy, token_kl, token_logps
from spo.ops.logps import at_least_float32, by_rows
from spo.sampling import derive_seed, sample
from spo.types import Sequences

SCORED_TOKENS = 16384
"""Of a forward pass that measures, prompts not shared: memory is bounded, and a device has enough to do."""


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
    speed: Speed,
    tokenizer: PreTrainedTokenizerBase,
    decode: Callable[[Sequence[int]], str],
    on_progress: Callable[[int], None] = lambda _: None,
    other: nn.Module | None = None,
) -> Draws:
    """Draws from ``model`` and scores with it and ``other``.

    A completion follows from the weights, ``settings.seed``, ``stage``, its prompt and its number: it is the same for
    any ``batch_size``, and for any other prompts. ``speed`` is settled for both models, and changes no number.
    """
    wanted = [(prompt, i) for prompt in prompts for i in range(settings.samples_per_prompt)]
    models = [model] if other is None else [model, other]
    rows: list[tuple[str, int, list[float]]] = [("", 0, [])] * len(wanted)
    for places in by_length([len(prompt.ids) for prompt, _ in wanted], settings.batch_size):
        chunk = [wanted[place] for place in places]
        sequences = sample(
            model,
            [prompt.ids for prompt, _ in chunk],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seeds=[derive_seed("evaluation", stage, settings.seed, prompt.prompt_id, i) for prompt, i in chunk],
            sampler=speed.sampler,
        )
        texts, tokens = map(decode, sequences.completions()), sequences.completion_length.tolist()
        numbers = [row for part in _parts(sequences) for row in _measured(models, part, speed, settings.temperature)]
        for place, text, length, values in zip(places, texts, tokens, numbers, strict=True):
            rows[place] = text, length, values
        on_progress(len(chunk))
    columns = [[row[2][i] for row in rows] for i in range(2 * len(models))]
    return Draws([row[0] for row in rows], [row[1] for row in rows], *columns)


def _parts(sequences: Sequences) -> Iterator[Sequences]:
    """Neighbours, as many as :data:`SCORED_TOKENS` allows; on the host, where they are laid out."""
    sequences = sequences.to("cpu")
    items = [(1, length) for length in sequences.length.tolist()]
    return map(sequences.rows, split_by_tokens(items, max_tokens=SCORED_TOKENS))


def _measured(models: Sequence[nn.Module], sequences: Sequences, speed: Speed, temperature: float) -> list[list[float]]:
    """For each sequence log-prob and entropy under the first model, and the other's log-prob and the KL to it."""

    def measure(targets: Tensor, *logits: Tensor) -> Tensor:
        if temperature != 1:  # widened first: the sampler does not divide in half precision
            logits = tuple(at_least_float32(values) / temperature for values in logits)
        found = [token_logps(logits[0], targets), token_entropy(logits[0])]
        if len(logits) > 1:
            found += [token_logps(logits[1], targets), token_kl(*logits)]
        return torch.stack(found, dim=-1)

    sequences = speed.arrange(sequences).to(next(models[0].parameters()).device)
    logits = [speed.logits(model, sequences) for model in models]
    # all at once for some of the rows: logits that are made on demand are made a single time
    values = by_rows(measure, completion_targets(sequences), *logits)
    return torch.stack([sum_per_sequence(column, sequences) for column in values.unbind(-1)], dim=-1).tolist()
