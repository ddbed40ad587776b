"""Loading of a model into shards, of which each process reads its own from the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

Shard = Callable[[nn.Module], None]
LOADS_SHARDS = (5, 23)
"""Version of transformers from which on loading into shards is known to be right."""


@contextmanager
def sharded_loading(shard: Shard | None) -> Iterator[None]:
    """Make a context in which ``from_pretrained`` shards a model before it reads the weights.

    The model is on the meta device until then, so a process has nothing but its shards in memory. A model whose
    weights change while they are loaded is loaded whole, as outside of the context.

    Args:
        shard: Function that shards a model; ``None`` for a context without effect.
    """
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    if shard is None or version < LOADS_SHARDS:
        yield
        return
    load: Any = PreTrainedModel._load_pretrained_model

    def load_shards(
        model: Any, state: Any, files: Sequence[str] | None, config: Any, *rest: Any, **options: Any
    ) -> Any:
        if state is None and files and config.hf_quantizer is None and all(map(_is_safetensors, files)):
            slices = _slices(files)
            if not any(name.endswith(tuple(model.all_tied_weights_keys)) for name in slices):
                # FSDP has to know which layers share a weight. Those that the files do not tie are loaded whole.
                model.tie_weights(recompute_mapping=False)
                shard(model)
                return load(model, slices, None, config, *rest, **options)
        return load(model, state, files, config, *rest, **options)

    with patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(load_shards)):
        yield


def class_name(model: nn.Module) -> str:
    """Return the name of the class of a model, without what sharding puts before it."""
    return type(model).__name__.removeprefix("FSDP")


def _is_safetensors(file: str) -> bool:
    return str(file).endswith(".safetensors")


def _slices(files: Sequence[str]) -> dict[str, Any]:
    """Return the tensors of files by name, of which any part can be read, and which are not in memory."""
    # Not mapped into memory, where the pages of all that was read would count.
    opened = [safe_open(file, framework="pt", device="cpu", backend="pread") for file in files]
    return {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118
