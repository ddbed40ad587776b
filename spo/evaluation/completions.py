"""Completions of a model on the evaluation prompts, with their log-probs, entropies and KL under both models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spo.batching import by_length, split_by_tokens
from spo.data import EvalPrompt
from spo.evaluation.settings import EvaluationSettings
from spo.forward.speed import Speed
from spo.ops import completion_targets, sum_per_sequence, token_entropy, token_kl, token_logps
from spo.ops.logps import at_least_float32, by_rows
from spo.processes import deal, gather
from spo.sampling import contents, derive_seed, sample
from spo.types import Sequences

OtherModel = Callable[[], AbstractContextManager[nn.Module]]
"""Function to a context with a model: a reference without weights of its own is a state of the policy."""
SCORED_TOKENS = 16384
"""Limit of tokens in a forward pass that scores: it bounds memory and keeps a GPU busy. Shared prompts count again."""


@dataclass(frozen=True)
class Draws:
    """Completions with measurements: ``samples_per_prompt`` of the first prompt, then of the next.

    Log-probs, entropies and the KL belong to the distributions at the sampling temperature, for both models.

    Attributes:
        texts: Completions without the token that ends them.
        tokens: Lengths in tokens, with the token that ends them.
        logps: Log-probs under the model that drew the completions, nats.
        entropy: Sums over tokens of next-token entropies of that model, nats.
        other_logps: Log-probs under the other model, nats; empty if there is none.
        kl: Sums over tokens of KL(model || other model), nats; empty if there is none.
        further_kl: For each completion, the same sums for each further model, nats; empty lists if there is none.
    """

    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    other_logps: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    further_kl: list[list[float]] = field(default_factory=list)


@torch.no_grad()
def draw(
    model: nn.Module,
    stage: str,
    prompts: Sequence[EvalPrompt],
    settings: EvaluationSettings,
    speed: Speed,
    stop_ids: Sequence[int],
    pad_token_id: int,
    decode: Callable[[Sequence[int]], str],
    on_progress: Callable[[int], None] = lambda _: None,
    other: OtherModel | None = None,
    further: Sequence[nn.Module] = (),
) -> Draws:
    """Draw completions from ``model`` and score them with it, with ``other`` and with ``further`` models.

    A completion depends on the weights, ``settings.seed``, ``stage``, its prompt and its number only. It is the same
    for each ``batch_size``, and whatever the other prompts are.

    Args:
        model: Model that draws.
        stage: Name that separates the random numbers of policy and reference.
        prompts: Prompts of one split.
        settings: Settings of the evaluation.
        speed: Speed settings, resolved for all models. They change no number.
        stop_ids: Tokens that end a completion.
        pad_token_id: Token that fills rows up.
        decode: Function from the token ids of a completion to its text.
        on_progress: Function to call with the number of completions just drawn.
        other: Function to a context with the model to compare with, ``None`` for none.
        further: Models to which the KL is measured as well, in eval mode. They take an ``other``.
    """
    others: list[OtherModel] = [] if other is None else [other]
    others += map(_always, further)
    wanted = [(prompt, i) for prompt in prompts for i in range(settings.samples_per_prompt)]
    rows: list[tuple[str, int, list[float]]] = [("", 0, [])] * len(wanted)
    for places in by_length([len(prompt.ids) for prompt, _ in wanted], settings.batch_size):
        chunk = [wanted[place] for place in places]
        sequences = sample(
            model,
            [prompt.ids for prompt, _ in chunk],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop_ids=stop_ids,
            pad_token_id=pad_token_id,
            seeds=[derive_seed("evaluation", stage, settings.seed, prompt.prompt_id, i) for prompt, i in chunk],
            sampler=speed.sampler,
        )
        texts, tokens = map(decode, contents(sequences, stop_ids)), sequences.completion_length.tolist()
        numbers = [
            row
            for part in _split_for_scoring(sequences)
            for row in _measure(model, others, part, speed, settings.temperature)
        ]
        for place, text, length, values in zip(places, texts, tokens, numbers, strict=True):
            rows[place] = text, length, values
        on_progress(len(chunk))
    measured = [row[2] for row in rows]
    return Draws(
        texts=[row[0] for row in rows],
        tokens=[row[1] for row in rows],
        logps=[one[0] for one in measured],
        entropy=[one[1] for one in measured],
        other_logps=[one[2] for one in measured if others],
        kl=[one[3] for one in measured if others],
        further_kl=[one[4:] for one in measured],
    )


def draw_together(
    model: nn.Module, stage: str, prompts: Sequence[EvalPrompt], settings: EvaluationSettings, *further: Any
) -> Draws:
    """Do what :func:`draw` does, with the prompts dealt to the processes of the run. Each returns all completions.

    Args:
        model: Model that draws, whole and in every process.
        stage: Name that separates the random numbers of policy and reference.
        prompts: Prompts of one split.
        settings: Settings of the evaluation.
        further: Further arguments of :func:`draw`.
    """
    columns, each = vars(draw(model, stage, deal(prompts), settings, *further)), settings.samples_per_prompt
    own = [
        {name: values[first : first + each] for name, values in columns.items()}
        for first in range(0, len(columns["texts"]), each)
    ]
    of_prompts = gather(own)
    return Draws(**{name: [value for prompt in of_prompts for value in prompt[name]] for name in columns})


def _always(model: nn.Module) -> OtherModel:
    return lambda: nullcontext(model)


def _split_for_scoring(sequences: Sequences) -> Iterator[Sequences]:
    """Yield runs of neighboring sequences within :data:`SCORED_TOKENS`, on the host, which arranges them."""
    sequences = sequences.to("cpu")
    items = [(1, length) for length in sequences.length.tolist()]
    return map(sequences.rows, split_by_tokens(items, max_tokens=SCORED_TOKENS))


def _measure(
    model: nn.Module, others: Sequence[OtherModel], sequences: Sequences, speed: Speed, temperature: float
) -> list[list[float]]:
    """Return numbers of each sequence.

    They are log-prob and entropy under the first model, log-prob under the first other one, and the KL to each other.
    """

    def measure(targets: Tensor, *logits: Tensor) -> Tensor:
        if temperature != 1:  # cast first, since the sampler does not divide in half precision either
            logits = tuple(at_least_float32(values) / temperature for values in logits)
        found = [token_logps(logits[0], targets), token_entropy(logits[0])]
        if len(logits) > 1:
            found += [token_logps(logits[1], targets), token_kl(*logits[:2])]
        found += [token_kl(logits[0], of_further) for of_further in logits[2:]]
        return torch.stack(found, dim=-1)

    sequences = speed.arrange(sequences).to(next(model.parameters()).device)
    logits = [speed.logits(model, sequences)]
    for other in others:
        with other() as other_model:
            logits.append(speed.logits(other_model, sequences))
    # All values of a group of rows are computed together, so deferred logits are computed only once.
    values = by_rows(measure, completion_targets(sequences), *logits)
    return torch.stack([sum_per_sequence(column, sequences) for column in values.unbind(-1)], dim=-1).tolist()
