"""Linear Alignment: decoding with a principle in the prompt, amplified against the prompt without it.

Gao et al., Linear Alignment (arXiv:2401.11458). The formula, and both ways to choose the nucleus, are those of the
official code.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Seq
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor

from spo.forward.head import base_model
from spo.forward.modes import eval_mode
from spo.forward.neighbors import Company, scale_of
from spo.forward.probe import probe_drawing
from spo.forward.sharding import gathered
from spo.ops.logps import at_least_float32
from spo.sampling import draw, static
from spo.sampling.generate import as_sequences, generate_tokens, uncompiled
from spo.types import Sequences, pad_prompts

Nucleus = Literal["principled", "contrast"]
"""Logits that choose the nucleus: those with the principle alone, or their contrast itself."""


def align_logits(
    principled: Tensor, plain: Tensor, *, ratio: float, nucleus: Nucleus, temperature: float, top_p: float
) -> Tensor:
    """Return logits that amplify what a principle changes: ``(1 + ratio) principled - ratio plain``, in the nucleus.

    With ``nucleus="principled"``, the nucleus is that of ``softmax(principled / temperature)``, as in the official
    evaluation. With ``nucleus="contrast"``, it is that of the new logits, as in the official demo. At temperature 0,
    both are taken at temperature 1.

    A row whose probabilities all round to 0 inside the nucleus falls back to the principled logits there, as in the
    official code. A token with a logit that is infinite in either context keeps its principled logit.

    Args:
        principled: ``(N, V)`` next-token logits of the context with the principle.
        plain: ``(N, V)`` next-token logits of the context without it.
        ratio: Strength of the contrast; 0 gives the principled logits.
        nucleus: Name of the logits that choose the nucleus.
        temperature: Temperature at which a token will be drawn from the result; 0 for greedy decoding.
        top_p: Probability that the nucleus has to reach; 1 keeps all tokens.

    Returns:
        ``(N, V)`` logits in float32 at least, before the temperature; ``-inf`` outside of the nucleus.
    """
    principled, plain = at_least_float32(principled), at_least_float32(plain)
    change = principled - plain
    aligned = principled + ratio * change.masked_fill(~change.isfinite(), 0)
    if top_p == 1:
        return aligned
    scale = temperature or 1.0
    chooses = principled if nucleus == "principled" else aligned
    weights = draw.relative_weights(chooses, scale)
    kept = draw.nucleus(weights.to(draw.widest_dtype(weights.device)), top_p)
    lost = (aligned / scale).softmax(-1).masked_fill(~kept, 0).sum(-1, keepdim=True) == 0
    return torch.where(lost, principled, aligned).masked_fill(~kept, -torch.inf)


class LinearAlignment(LogitsProcessor):
    """A logits processor of ``generate`` that runs the model on a second context, the prompts without the principle.

    The second context is given each new token of the first, and keeps its own keys and values. The processor comes
    before the temperature, and belongs to a single call of ``generate``.

    Args:
        model: Model that generates, in eval mode.
        plain_prompts: Token ids of each prompt without the principle, in the order of the batch.
        ratio: Strength of the contrast, see :func:`align_logits`.
        nucleus: Name of the logits that choose the nucleus.
        temperature: Temperature at which tokens will be drawn; 0 for greedy decoding.
        top_p: Probability that the nucleus has to reach.
        pad_token_id: Token id of padding.
    """

    def __init__(
        self,
        model: nn.Module,
        plain_prompts: Seq[Seq[int]],
        *,
        ratio: float,
        nucleus: Nucleus,
        temperature: float,
        top_p: float,
        pad_token_id: int,
    ) -> None:
        if nucleus not in get_args(Nucleus):
            raise ValueError(f"nucleus={nucleus}: choose {' or '.join(get_args(Nucleus))}")
        self.model = model
        self.settings: dict[str, Any] = {
            "ratio": ratio,
            "nucleus": nucleus,
            "temperature": temperature,
            "top_p": top_p,
        }
        self.ids, self.mask = pad_prompts(plain_prompts, pad_token_id, next(model.parameters()).device)
        self.takes_positions = "position_ids" in inspect.signature(base_model(model).forward).parameters
        keeps_states = _is_cached(model) and static.unsupported(model) is None
        self.states = DynamicCache(config=base_model(model).config) if keeps_states else None
        self.width: int | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the aligned logits of the next token.

        Args:
            input_ids: ``(N, T)`` token ids of the prompts with the principle, and of the tokens drawn so far.
            scores: ``(N, V)`` next-token logits of that context.
        """
        if self.width is None:
            self.width = input_ids.shape[1]
        new = input_ids[:, self.width :]
        ids, mask = torch.cat([self.ids, new], dim=1), torch.cat([self.mask, torch.ones_like(new)], dim=1)
        return align_logits(scores, self._plain_logits(ids, mask), **self.settings)

    def _plain_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the next-token logits of the context without the principle, in float32 as those of ``generate``."""
        more: dict[str, Any] = {}
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if self.states is not None:
            seen = self.states.get_seq_length()
            ids, positions = ids[:, seen:], positions[:, seen:]
            more[static.cache_keyword(base_model(self.model))] = self.states
        if self.takes_positions:
            more["position_ids"] = positions
        more["use_cache"] = self.states is not None
        output = self.model(input_ids=ids, attention_mask=mask, return_dict=True, **more)
        return output.logits[:, -1].float()


def _is_cached(model: nn.Module) -> bool:
    """Return whether keys and values of a model stay right while a sequence grows."""
    return probe_drawing(model).cache and scale_of(base_model(model)) is None


@torch.no_grad()
def sample_aligned(
    model: nn.Module,
    prompts: Seq[Seq[int]],
    plain_prompts: Seq[Seq[int]],
    *,
    ratio: float,
    nucleus: Nucleus = "principled",
    max_new_tokens: int,
    temperature: float,
    stop_ids: Seq[int],
    pad_token_id: int,
    seeds: Seq[int],
    top_p: float = 1.0,
) -> Sequences:
    """Draw one completion per prompt by Linear Alignment, with dropout off.

    A completion depends on the weights, its two prompts and its seed, as in :func:`spo.sampling.sample`. With ratio 0,
    it is the completion that this function draws from the prompt with the principle.

    Args:
        model: Hugging Face causal language model, whole in this process.
        prompts: Token ids of each prompt with the principle.
        plain_prompts: Token ids of each prompt without the principle.
        ratio: Strength of the contrast, see :func:`align_logits`.
        nucleus: Name of the logits that choose the nucleus.
        max_new_tokens: Length limit of a completion in tokens.
        temperature: Temperature of the softmax; 0 decodes greedily.
        stop_ids: Tokens that end a completion.
        pad_token_id: Token id of padding.
        seeds: Seed of each prompt.
        top_p: Probability that the nucleus has to reach; 1 keeps all tokens.

    Returns:
        ``len(prompts)`` sequences of the prompts with the principle, right-padded.

    Raises:
        ValueError: ``top_p`` or ``nucleus`` is out of range.
    """
    draw.check_top_p(top_p)
    device = next(model.parameters()).device
    numbers = draw.uniform_numbers(seeds, max_new_tokens, device)
    generated = torch.full(numbers.shape, pad_token_id, dtype=torch.long, device=device)
    with gathered(model), eval_mode(model), uncompiled(model):
        together = probe_drawing(model).company is Company.ANY and scale_of(base_model(model)) is None
        for rows in [[*range(len(prompts))]] if together else [[row] for row in range(len(prompts))]:
            ids, mask = pad_prompts([prompts[row] for row in rows], pad_token_id, device)
            alignment = LinearAlignment(
                model,
                [plain_prompts[row] for row in rows],
                ratio=ratio,
                nucleus=nucleus,
                temperature=temperature,
                top_p=top_p,
                pad_token_id=pad_token_id,
            )
            drawn = generate_tokens(
                model,
                ids,
                mask,
                numbers[rows],
                temperature=temperature,
                stop_ids=stop_ids,
                pad_token_id=pad_token_id,
                processors=[alignment],
                use_cache=_is_cached(model),
            )
            generated[rows, : drawn.shape[1]] = drawn
    return as_sequences(prompts, generated, stop_ids, pad_token_id)
