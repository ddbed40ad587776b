"""Drawing completions y ~ pi(.|x): the one place, for regularizer, monitoring, evaluation and data alike."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from spo.types import Sequences


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; each module's mode as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _own_settings(model: nn.Module) -> Iterator[None]:
    """``generate`` fills what a call leaves out from the model's generation_config.json: a bias, a banned token ..."""
    held = {module: module.generation_config for module in model.modules() if "generation_config" in vars(module)}
    for module in held:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in held.items():
            module.generation_config = config


def _left_padded(prompts: Seq[Seq[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


class _Draw(LogitsProcessor):
    """Leaves each row one token, drawn by inverting its distribution at a number of the row's own.

    Args:
        numbers: ``(N, max_new_tokens)`` uniform in [0, 1): what a row draws does not depend on those beside it.
        temperature: of the softmax.
        start: length of the padded prompts.
    """

    def __init__(self, numbers: Tensor, temperature: float, start: int) -> None:
        self.numbers, self.temperature, self.start = numbers, temperature, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # In float64, where the device has it: the sums of a large vocabulary would round to its rare tokens' size.
        cumulative = (scores.to(self.numbers.dtype) / self.temperature).softmax(-1).cumsum(-1)
        numbers = self.numbers[:, input_ids.shape[1] - self.start, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, numbers, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def _numbers(seeds: Seq[int], length: int, device: torch.device) -> Tensor:
    rows = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device, torch.float32 if device.type == "mps" else torch.float64)


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
) -> Sequences:
    """Draws one completion per prompt, with no truncation of the distribution and dropout off.

    What is drawn for a prompt follows from the weights, the prompt and its seed: other prompts of the batch, their
    number and the global random state have no part in it (but for rounding: batches of other shapes add up in another
    order). A completion ends with its first end-of-text token, which belongs to it, or is cut at ``max_new_tokens``.

    Args:
        model: a Hugging Face causal language model; its mode is left as it was.
        prompts: token ids of each prompt, none empty.
        max_new_tokens: length limit of a completion.
        temperature: 1 samples the model's own distribution, 0 decodes greedily.
        eos_token_id: ends a completion wherever it is generated (its value in the prompt means nothing).
        pad_token_id: fills the padding.
        seeds: one per prompt.

    Returns:
        ``len(prompts)`` sequences, right-padded.
    """
    device = next(model.parameters()).device
    ids, mask = _left_padded(prompts, pad_token_id, device)
    config = GenerationConfig(
        do_sample=False,  # greedy, among the tokens that _Draw leaves
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    draw = [_Draw(_numbers(seeds, max_new_tokens, device), temperature, ids.shape[1])] if temperature > 0 else []
    with _own_settings(model), eval_mode(model):
        generated = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList(draw),
            synced_gpus=isinstance(model, FSDPModule),  # shards are gathered by all ranks together
        )[:, ids.shape[1] :]
    ended = (generated == eos_token_id).long().cumsum(1)
    completion_length = ((ended - (generated == eos_token_id).long()) == 0).sum(1)
    return _right_padded(prompts, generated, completion_length, pad_token_id)


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
