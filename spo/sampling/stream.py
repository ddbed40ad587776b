"""Sampling of one completion whose tokens are handed over as soon as they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from spo.forward.modes import eval_mode
from spo.sampling.draw import check_top_p, uniform_numbers
from spo.sampling.generate import as_sequences, batches, generate_tokens, uncompiled


class _HandOver(BaseStreamer):
    """A streamer that hands over each token after the prompt, which ``generate`` puts first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.is_prompt = on_token, True

    def put(self, value: Tensor) -> None:
        if not self.is_prompt:
            self.on_token(int(value))
        self.is_prompt = False

    def end(self) -> None:
        """Do nothing: the caller sees the end of the call."""


@torch.no_grad()
def stream(
    model: nn.Module,
    prompt: Seq[int],
    on_token: Callable[[int], None],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_ids: Seq[int],
    pad_token_id: int,
    seed: int,
    top_p: float = 1.0,
) -> list[int]:
    """Draw the completion that :func:`spo.sampling.sample` draws, and hand over its tokens one by one.

    Args:
        model: Hugging Face causal language model, whole in this process.
        prompt: Token ids of the prompt.
        on_token: Function to call with each token, the one that ends the completion included.
        max_new_tokens: Length limit of the completion in tokens.
        temperature: Temperature of the softmax; 0 decodes greedily.
        stop_ids: Tokens that end a completion.
        pad_token_id: Token id of padding.
        seed: Seed of the completion.
        top_p: Probability that the nucleus of each token has to reach; 1 draws from all tokens.

    Returns:
        Token ids of the completion, with the token that ends it unless it was cut.

    Raises:
        ValueError: ``top_p`` is not above 0 and at most 1.
    """
    check_top_p(top_p)
    device = next(model.parameters()).device
    ids, numbers = torch.tensor([[*prompt]], device=device), uniform_numbers([seed], max_new_tokens, device)
    mask = torch.ones_like(ids)
    with eval_mode(model), uncompiled(model):
        [(_, decode)] = batches(model, [len(prompt)], max_new_tokens, "generate")
        is_cached = decode is generate_tokens
        drawn = decode(
            model,
            ids,
            mask,
            numbers,
            temperature=temperature,
            stop_ids=stop_ids,
            pad_token_id=pad_token_id,
            top_p=top_p,
            **({"streamer": _HandOver(on_token)} if is_cached else {}),
        )
    [completion] = as_sequences([prompt], drawn, stop_ids, pad_token_id).completions()
    if not is_cached:
        for token in completion:
            on_token(token)
    return completion
