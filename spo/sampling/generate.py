"""Sampling of completions y ~ pi(.|x), in one place for regularizer, monitoring, evaluation and data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from spo.batching import even_parts_by_length
from spo.forward.head import base_model
from spo.forward.modes import default_generation_config, eval_mode
from spo.forward.neighbors import Company, alike, note_once, refuse_if_sharded, scale_of
from spo.forward.probe import Drawing, probe_drawing
from spo.forward.sharding import gathered, needs_all_processes
from spo.logs import log_once
from spo.sampling import static, uncached
from spo.sampling.draw import check_top_p, next_tokens, uniform_numbers
from spo.types import Sequences, pad_prompts

log = logging.getLogger(__name__)

MAX_BATCH_TOKENS = 32768
"""Largest number of tokens of a batch, with padding and room for completions: 4 GB of keys and values of an 8B model
in 16 bits."""


def uncompiled(model: nn.Module) -> AbstractContextManager[None]:
    """Run compiled blocks without compilation inside: each new sequence length would be compiled anew."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


class _Draw(LogitsProcessor):
    """A logits processor that draws a token for each row and masks out all others.

    Args:
        numbers: ``(N, max_new_tokens)`` uniform numbers in [0, 1) of each row.
        temperature: Temperature of the softmax.
        top_p: Probability that the nucleus of each token has to reach.
        prompt_width: Length of the padded prompts in tokens.
    """

    def __init__(self, numbers: Tensor, temperature: float, top_p: float, prompt_width: int) -> None:
        self.numbers, self.temperature, self.top_p, self.prompt_width = numbers, temperature, top_p, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that are finite for the drawn token alone."""
        numbers = self.numbers[:, input_ids.shape[1] - self.prompt_width]
        tokens = next_tokens(scores, numbers, self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def generate_tokens(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    numbers: Tensor,
    *,
    temperature: float,
    stop_ids: Seq[int],
    pad_token_id: int,
    top_p: float = 1.0,
    processors: Seq[LogitsProcessor] = (),
    streamer: BaseStreamer | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Do what :func:`spo.sampling.static.decode` does with Hugging Face's ``generate``.

    The result is only as wide as the longest completion.

    Args:
        model: Hugging Face causal language model.
        ids: ``(N, T)`` token ids of the prompts, left-padded.
        mask: ``(N, T)`` 1 on their tokens, 0 on padding.
        numbers: ``(N, new)`` uniform numbers in [0, 1), one for each token to draw; ``new`` is the length limit.
        temperature: Temperature of the softmax; 0 decodes greedily.
        stop_ids: Tokens that end a completion.
        pad_token_id: Token id that fills the rest of the row.
        top_p: Probability that the nucleus of each token has to reach; 1 draws from all tokens.
        processors: Logits processors that come before the temperature.
        streamer: Receiver of each token as soon as it is drawn, for a single row.
        use_cache: True to keep keys and values from token to token.
    """
    config = GenerationConfig(
        do_sample=False,  # Greedy decoding takes the tokens that _Draw left.
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=numbers.shape[1],
        eos_token_id=list(stop_ids),
        pad_token_id=pad_token_id,
        use_cache=use_cache,
    )
    draw = [_Draw(numbers, temperature, top_p, ids.shape[1])] if temperature > 0 else []
    generate: Any = model.generate  # Any, because nn.Module types undeclared attributes as tensors or modules.
    with default_generation_config(model):
        return generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([*processors, *draw]),
            streamer=streamer,
            synced_gpus=needs_all_processes(model),  # All ranks gather the shards together.
        )[:, ids.shape[1] :]


class Sampler(NamedTuple):
    """A way to decode completions.

    Attributes:
        decode: Function with the arguments and the result of :func:`spo.sampling.static.decode`. The result may be as
            narrow as the longest completion. Row ``i`` chooses its token ``t`` by
            :func:`spo.sampling.draw.next_tokens` from the logits of a forward pass, in float32 at least, and from
            ``numbers[i, t]``. What follows a stop token in a row is ignored.
        unsupported: Function from a model to the reason why it cannot be decoded in this way, or to ``None``.
    """

    decode: Callable[..., Tensor]
    unsupported: Callable[[nn.Module], str | None]


SAMPLERS: dict[str, Sampler] = {
    "static": Sampler(static.decode, static.unsupported),
    "generate": Sampler(generate_tokens, lambda model: None),
}
"""Samplers by their name in ``speed.sampler``. One that does not support a model leaves it to ``generate``."""


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Seq[Seq[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_ids: Seq[int],
    pad_token_id: int,
    seeds: Seq[int],
    sampler: str,
    top_p: float = 1.0,
) -> Sequences:
    """Draw one completion per prompt, with dropout off, and from the whole distribution unless ``top_p`` cuts it.

    Every sampler keeps this contract, which ``tests/test_sampler_conformance.py`` checks:

    - The completion of a prompt depends on the weights, the prompt and its seed. It does not depend on other prompts,
      the sampler, or the global random state, except for rounding: other batch shapes add up in another order.
    - The probability of a token is that of a forward pass over the prompt and the tokens before it, which scores the
      sequence later. With ``top_p`` below 1, it is that probability divided by the one of the nucleus.
    - A completion ends with its first stop token, which is part of it, or is cut at ``max_new_tokens``.
    - Modes, weights and random state are afterwards what they were.

    Prompts of similar length are forwarded together, as many as :data:`MAX_BATCH_TOKENS` allows.

    Args:
        model: Hugging Face causal language model; its train or eval mode is restored.
        prompts: Token ids of each prompt, none empty.
        max_new_tokens: Length limit of a completion in tokens.
        temperature: Temperature of the softmax: 1 samples the model's own distribution, 0 decodes greedily.
        stop_ids: Tokens that end a completion, at least one; in a prompt they do not.
        pad_token_id: Token id of padding.
        seeds: Seed of each prompt.
        sampler: Name in :data:`SAMPLERS`: ``static`` for the loop of :mod:`spo.sampling.static`, with the models that
            it supports; ``generate`` for that of Hugging Face.
        top_p: Probability that the nucleus of each token has to reach, after the temperature, see
            :func:`spo.sampling.draw.nucleus`; 1 draws from all tokens.

    Returns:
        ``len(prompts)`` sequences, right-padded.

    Raises:
        ValueError: ``top_p`` is not above 0 and at most 1.
    """
    check_top_p(top_p)
    device = next(model.parameters()).device
    if not prompts:
        none = torch.empty(0, dtype=torch.long, device=device)
        return Sequences(none.view(0, 0), none, none)
    numbers = uniform_numbers(seeds, max_new_tokens, device)
    generated = torch.full(numbers.shape, pad_token_id, dtype=torch.long, device=device)
    with gathered(model), eval_mode(model), uncompiled(model):
        for rows, decode in batches(model, [*map(len, prompts)], max_new_tokens, sampler):
            ids, mask = pad_prompts([prompts[row] for row in rows], pad_token_id, device)
            index = torch.tensor(rows, device=device)
            drawn = decode(
                model,
                ids,
                mask,
                numbers[index],
                temperature=temperature,
                stop_ids=stop_ids,
                pad_token_id=pad_token_id,
                top_p=top_p,
            )
            generated[index, : drawn.shape[1]] = drawn
    return as_sequences(prompts, generated, stop_ids, pad_token_id)


def batches(
    model: nn.Module, lengths: list[int], max_new_tokens: int, sampler: str
) -> list[tuple[Seq[int], Callable[..., Tensor]]]:
    """Return the rows of each batch, and the function that decodes them.

    Rows that would change each other are drawn apart: only with rows of equal length, and so without padding, where
    padding changes a row; without a cache where positions change with the length that a completion may reach.

    Args:
        model: Hugging Face causal language model.
        lengths: Length of each prompt in tokens.
        max_new_tokens: Length limit of a completion in tokens.
        sampler: Name in :data:`SAMPLERS`.
    """
    causal = base_model(model)
    drawing, scale = probe_drawing(model), scale_of(causal)
    # Samplers may pad and cache as they like, so only `generate` is asked where either changes a row.
    chosen = SAMPLERS[sampler] if drawing == Drawing() and _is_supported(model, sampler) else SAMPLERS["generate"]

    def traits(row: int) -> tuple[bool, object]:
        length = lengths[row]
        scales = None if scale is None else (scale(length), scale(length + max_new_tokens - 1))
        cached = drawing.cache and (scales is None or scales[0] == scales[1])
        company = drawing.company if cached else min(drawing.company, Company.EQUAL_LENGTHS)
        return cached, company.key(row, length, scales)

    groups = alike(range(len(lengths)), traits)
    if len(groups) > 1 or not traits(0)[0]:
        refuse_if_sharded(model, causal)
        note_once(
            causal,
            "samples_drawn_alone",
            "prompts of different lengths are sampled apart: beside a longer one or with a cache, samples would change",
        )
    if needs_all_processes(model):
        # Ranks gather shards together, so they need equally many batches. Their prompts are as many, but not as long.
        return [(range(len(lengths)), generate_tokens)]
    found: list[tuple[Seq[int], Callable[..., Tensor]]] = []
    for rows in groups:
        decode = chosen.decode if traits(rows[0])[0] else uncached.decode
        parts = even_parts_by_length([lengths[row] for row in rows], max_new_tokens, MAX_BATCH_TOKENS)
        found += [([rows[place] for place in part], decode) for part in parts]
    return found


def _is_supported(model: nn.Module, sampler: str) -> bool:
    """Return whether a sampler supports a model, and log the reason once if it does not."""
    if reason := SAMPLERS[sampler].unsupported(model):
        name = type(base_model(model)).__name__
        message = f"{name}: sampled by Hugging Face's generate, not by speed.sampler={sampler}: {reason}"
        log_once(log, logging.INFO, message)
    return reason is None


def as_sequences(prompts: Seq[Seq[int]], generated: Tensor, stop_ids: Seq[int], pad: int) -> Sequences:
    """Return prompts and their completions as sequences on the device of ``generated``, right-padded.

    Args:
        prompts: Token ids of each prompt.
        generated: ``(N, new)`` token ids that a model drew. What follows a stop token in a row is ignored.
        stop_ids: Tokens that end a completion.
        pad: Token id of padding.
    """
    # A token is part of its completion if no stop token comes before it.
    is_stop = torch.isin(generated, torch.tensor(stop_ids, device=generated.device)).long()
    completion_length = (is_stop.cumsum(1) - is_stop == 0).sum(1)
    lengths = completion_length.tolist()
    width = max(len(prompt) + extra for prompt, extra in zip(prompts, lengths, strict=True))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    tokens = generated.cpu()
    for row, (prompt, extra) in enumerate(zip(prompts, lengths, strict=True)):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        ids[row, len(prompt) : len(prompt) + extra] = tokens[row, :extra]
    prompt_length = torch.tensor([len(prompt) for prompt in prompts])
    return Sequences(ids, prompt_length, prompt_length + completion_length.cpu()).to(generated.device)
