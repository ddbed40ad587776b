"""The check that no token depends on those after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from spo.errors import UserError
from spo.models.library_errors import Origin
from spo.models.sharded_loading import class_name

MAX_ROUNDING = 0.01
"""Largest difference of logits that counts as rounding, as a share of the largest logit."""


def check_causal(origin: Origin, model: PreTrainedModel) -> None:
    """Refuse a model in which a token depends on later ones, such as BERT, or whose logits are not numbers.

    All processes call this for a sharded model.

    Args:
        origin: Place of the model.
        model: Model in eval mode.

    Raises:
        UserError: The model is not causal, or computes NaN.
    """
    try:
        is_sharded = isinstance(model, FSDPModule)
        logits, depends = _compare_first_logits(model) if is_sharded else _differentiate_first_logits(model)
    except Exception:  # Some architectures run on a GPU only, and some do not look up their input in a module.
        return
    if logits.isnan().any():
        raise UserError(
            f"{origin} cannot be used: it computes NaN for a short text; copy or download the weights again"
        )
    if depends:
        raise UserError(
            f"{origin} cannot be used: in this {class_name(model)}, a token depends on those after it, so it is not "
            "a causal language model; choose a decoder-only language model"
        )


def _differentiate_first_logits(model: Any) -> tuple[Tensor, bool]:
    """Return the first logits of a short text, and whether they depend on later tokens.

    Their gradient with respect to later embeddings is exactly zero in a causal model, in every dtype.
    """
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits[:, 0]
            total = torch.where(logits.isfinite(), logits, 0).sum()
    finally:
        handle.remove()
    [gradient] = torch.autograd.grad(total, embedded)
    # The batch is one row, which some models put second.
    return logits, bool((gradient.flatten(0, -2)[1:].abs() > 0).any())


@torch.no_grad()
def _compare_first_logits(model: Any) -> tuple[Tensor, bool]:
    """Return the first logits of two short texts, and whether they depend on later tokens, which differ.

    It does without a backward pass, for which a sharded model would gather all of its weights.
    """
    texts = torch.tensor([[1, 1, 1, 1], [1, 2, 3, 4]], device=model.device)
    logits = model(input_ids=texts).logits[:, 0].float()
    finite = torch.where(logits.isfinite(), logits, 0)
    return logits, bool((finite[0] - finite[1]).abs().max() > MAX_ROUNDING * finite.abs().max())
