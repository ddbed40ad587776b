"""A decoding loop without a cache, for models whose cached states do not fit the tokens that follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spo.forward.head import base_model
from spo.sampling.draw import next_tokens


@torch.no_grad()
def decode(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    numbers: Tensor,
    *,
    temperature: float,
    stop_ids: Sequence[int],
    pad_token_id: int,
    top_p: float = 1.0,
) -> Tensor:
    """Do what :func:`spo.sampling.static.decode` does with a plain forward pass over the whole prefix for each token.

    Args:
        model: Hugging Face causal language model.
        ids: ``(N, T)`` token ids of the prompts, without padding.
        mask: ``(N, T)`` ones.
        numbers: ``(N, new)`` uniform numbers in [0, 1), one for each token to draw; ``new`` is the length limit.
        temperature: Temperature of the softmax; 0 decodes greedily.
        stop_ids: Tokens that end a completion.
        pad_token_id: Token id that fills the rest of the row.
        top_p: Probability that the nucleus of each token has to reach; 1 draws from all tokens.

    Returns:
        ``(N, new)`` token ids.
    """
    last_only = {"logits_to_keep": 1} if base_model(model)._supports_logits_to_keep() else {}
    completions, stops = ids.new_full(numbers.shape, pad_token_id), torch.tensor(stop_ids, device=ids.device)
    active = torch.arange(len(ids), device=ids.device)
    for step in range(numbers.shape[1]):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **last_only)
        tokens = next_tokens(output.logits[:, -1].float(), numbers[active, step], temperature, top_p)
        completions[active, step] = tokens
        going = ~torch.isin(tokens, stops)
        if not going.any():
            break
        ids, active = torch.cat([ids, tokens[:, None]], dim=1)[going], active[going]
    return completions
