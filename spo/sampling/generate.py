"""Drawing completions y ~ pi(.|x): the one place, for regularizer, monitoring, evaluation and data alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig

from spo.types import Sequences


def derive_seed(*parts: object) -> int:
    """A seed for one use of randomness, from what identifies it: no stage can disturb another's stream."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


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


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Seq[Seq[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    seed: int,
) -> Sequences:
    """Draws one completion per prompt, with no truncation of the distribution and dropout off.

    A completion ends with its first end-of-text token, which belongs to it, or is cut at ``max_new_tokens``.

    Args:
        model: a Hugging Face causal language model; its mode and the global random state are left as they were.
        prompts: token ids of each prompt, none empty.
        max_new_tokens: length limit of a completion.
        temperature: 1 samples the model's own distribution, 0 decodes greedily.
        eos_token_id: ends a completion wherever it is generated (its value in the prompt means nothing).
        pad_token_id: fills the padding.
        seed: the samples are a function of it, of the weights and of the prompts.

    Returns:
        ``len(prompts)`` sequences, right-padded.
    """
    device = next(model.parameters()).device
    ids, mask = _left_padded(prompts, pad_token_id, device)
    config = GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        top_k=0,  # transformers' own default is 50
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    with _own_randomness(seed, device), _own_settings(model), eval_mode(model):
        generated = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
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
