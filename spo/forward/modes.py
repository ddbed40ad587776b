"""Modes of a model that hold inside a context: eval mode, and generation without the model's own defaults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig

from spo.forward.sharding import reshard


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the context, and restore the mode of each module afterwards.

    A sharded model gives up the whole weights that forward passes have left in it.
    """
    # Module by module: `model.train()` would also switch on a part that was in eval mode before.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        reshard(model)


@contextmanager
def default_generation_config(model: nn.Module) -> Iterator[None]:
    """Hide the generation configs of a model inside the context.

    ``generate`` takes each setting that a call leaves out from them, and ``save_pretrained`` rejects some of them.
    """
    configs: dict[Any, Any] = {
        module: module.generation_config for module in model.modules() if "generation_config" in vars(module)
    }
    for module in configs:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in configs.items():
            module.generation_config = config
