"""Drawing completions y ~ pi(.|x): the one place, for regularizer, monitoring, evaluation and data alike."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from spo.batching import even_parts_by_length
from spo.forward.head import base_model
from spo.forward.modes import eval_mode
from spo.logs import log_once
from spo.sampling import static
from spo.sampling.draw import next_tokens, uniform_numbers
from spo.types import Sequences

log = logging.getLogger(__name__)

MOST_TOKENS = 32768
"""Of a batch, padding and room for the completions counted: 4 GB of keys and values of an 8B model in 16 bits."""


@contextmanager
def _own_settings(model: nn.Module) -> Iterator[None]:
    """``generate`` fills what a call leaves out from the model's generation_config.json: a bias, a banned token ..."""
    held: dict[Any, Any] = {
        module: module.generation_config for module in model.modules() if "generation_config" in vars(module)
    }
    for module in held:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in held.items():
            module.generation_config = config


def _uncompiled(model: nn.Module) -> AbstractContextManager[None]:
    """Compiled blocks run as they are written inside: each new length of a sequence would be compiled anew."""
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _left_padded(prompts: Seq[Seq[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


class _Draw(LogitsProcessor):
    """Leaves each row the one token that it draws.

    Args:
        numbers: ``(N, max_new_tokens)`` uniform in [0, 1), of each row.
        temperature: of the softmax.
        start: length of the padded prompts.
    """

    def __init__(self, numbers: Tensor, temperature: float, start: int) -> None:
        self.numbers, self.temperature, self.start = numbers, temperature, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = next_tokens(scores, self.numbers[:, input_ids.shape[1] - self.start], self.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _generate(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    numbers: Tensor,
    *,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
) -> Tensor:
    """What :func:`spo.sampling.static.decode` does, by Hugging Face's ``generate``; as wide as the longest row."""
    config = GenerationConfig(
        do_sample=False,  # greedy, among the tokens that _Draw leaves
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=numbers.shape[1],
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    draw = [_Draw(numbers, temperature, ids.shape[1])] if temperature > 0 else []
    with _own_settings(model):
        return model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList(draw),
            synced_gpus=isinstance(model, FSDPModule),  # shards are gathered by all ranks together
        )[:, ids.shape[1] :]


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Seq[Seq[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    seeds: Seq[int],
    sampler: Literal["static", "generate"],
) -> Sequences:
    """Draws one completion per prompt, with no truncation of the distribution and dropout off.

    What is drawn for a prompt follows from the weights, the prompt and its seed: other prompts of the batch, their
    number, the sampler and the global random state have no part in it (but for rounding: batches of other shapes add
    up in another order). A completion ends with its first end-of-text token, which belongs to it, or is cut at
    ``max_new_tokens``. Prompts of like length are forwarded together, as many as :data:`MOST_TOKENS` allows.

    Args:
        model: a Hugging Face causal language model; its mode is left as it was.
        prompts: token ids of each prompt, none empty.
        max_new_tokens: length limit of a completion.
        temperature: 1 samples the model's own distribution, 0 decodes greedily.
        eos_token_id: ends a completion wherever it is generated (its value in the prompt means nothing).
        pad_token_id: fills the padding.
        seeds: one per prompt.
        sampler: ``static`` is the loop of :mod:`spo.sampling.static`, for the models that it can decode with;
            ``generate`` is Hugging Face's.

    Returns:
        ``len(prompts)`` sequences, right-padded.
    """
    device = next(model.parameters()).device
    decode = static.decode if sampler == "static" and _is_static(model) else _generate
    numbers = uniform_numbers(seeds, max_new_tokens, device)
    generated = torch.full(numbers.shape, pad_token_id, dtype=torch.long, device=device)
    # Shards are gathered by all ranks together, whose prompts are as many but not as long.
    whole = isinstance(model, FSDPModule)
    with eval_mode(model), _uncompiled(model):
        for rows in (
            [range(len(prompts))] if whole else even_parts_by_length([*map(len, prompts)], max_new_tokens, MOST_TOKENS)
        ):
            ids, mask = _left_padded([prompts[row] for row in rows], pad_token_id, device)
            index = torch.tensor(rows, device=device)
            drawn = decode(
                model,
                ids,
                mask,
                numbers[index],
                temperature=temperature,
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
            )
            generated[index, : drawn.shape[1]] = drawn
    ended = (generated == eos_token_id).long().cumsum(1)
    completion_length = ((ended - (generated == eos_token_id).long()) == 0).sum(1)
    return _right_padded(prompts, generated, completion_length, pad_token_id)


def _is_static(model: nn.Module) -> bool:
    if reason := static.unsupported(model):
        name = type(base_model(model)).__name__
        message = f"{name}: sampled by Hugging Face's generate, not by speed.sampler=static: {reason}"
        log_once(log, logging.INFO, message)
    return reason is None


def _right_padded(prompts: Seq[Seq[int]], generated: Tensor, completion_length: Tensor, pad: int) -> Sequences:
    lengths = completion_length.tolist()
    width = max(len(prompt) + extra for prompt, extra in zip(prompts, lengths, strict=True))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    tokens = generated.cpu()
    for row, (prompt, extra) in enumerate(zip(prompts, lengths, strict=True)):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        ids[row, len(prompt) : len(prompt) + extra] = tokens[row, :extra]
    prompt_length = torch.tensor([len(prompt) for prompt in prompts])
    return Sequences(ids, prompt_length, prompt_length + completion_length.cpu()).to(generated.device)
