"""Loading of policies from Hugging Face folders, with or without an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spo.models.adapters import LoraSettings, with_fresh_adapter, with_given_adapter
from spo.models.generation import read_stop_ids
from spo.models.library_errors import Origin
from spo.models.loading import load_causal_model, load_config, load_tokenizer
from spo.models.sharded_loading import Shard

Initial = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class ModelSpec:
    """Settings for loading a model: the ``model`` config group without its defaults for training.

    Attributes:
        path: Hugging Face folder or hub name; ``None`` if ``initial`` makes the model.
        initial: Function that makes fresh weights and their tokenizer; ``None`` if ``path`` is given.
        dtype: Name of a torch dtype.
        attn_implementation: Name of an attention implementation of transformers; ``auto`` for SDPA where the model
            supports it, and the model's own default elsewhere.
        trust_remote_code: Whether code in the model folder may run.
        dropout: Dropout probability of the policy in training; the reference does not use dropout.
        gradient_checkpointing: Recompute activations in the backward pass.
        lora: Adapter to train instead of the weights, or ``None``.
        adapter_path: Folder of an adapter to continue from, which is the reference too; or ``None``.
    """

    path: str | None
    initial: Initial | None
    dtype: str
    attn_implementation: str
    trust_remote_code: bool
    dropout: float
    gradient_checkpointing: bool
    lora: LoraSettings | None
    adapter_path: str | None

    def origin(self, path: str | Path) -> Origin:
        """Return a place to load from, named by its key if it is the configured one."""
        return Origin(path, "model.path" if str(path) == self.path else None)

    def tokenizer(self, path: str | Path) -> PreTrainedTokenizerBase:
        """Load the tokenizer from a folder or hub name."""
        return load_tokenizer(self.origin(path), self.trust_remote_code)

    def stop_ids(self, path: str | Path) -> tuple[int, ...]:
        """Return the tokens by which the model of a folder or hub name ends a generation."""
        config = load_config(self.origin(path), self.trust_remote_code)
        return read_stop_ids(path, config.get_text_config().vocab_size)

    def base(self, path: str | Path, *, dropout: float = 0.0, shard: Shard | None = None) -> PreTrainedModel:
        """Load the model without an adapter, in eval mode.

        Args:
            path: Hugging Face folder or hub name.
            dropout: Dropout probability wherever the architecture has dropout.
            shard: Function that shards the model before its weights are read.
        """
        return self.load(self.origin(path), dropout=dropout, shard=shard)

    def load(self, origin: Origin, *, dropout: float = 0.0, shard: Shard | None = None) -> PreTrainedModel:
        """Load a model without an adapter, in eval mode, with these settings.

        Args:
            origin: Place of the model.
            dropout: Dropout probability wherever the architecture has dropout.
            shard: Function that shards the model before its weights are read.
        """
        return load_causal_model(
            origin,
            dtype=getattr(torch, self.dtype),
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            dropout=dropout,
            shard=shard,
        )

    def policy(self, path: str | Path, *, seed: int, shard: Shard | None = None) -> nn.Module:
        """Load the model to train, in train mode.

        Args:
            path: Folder of the initial weights.
            seed: Random seed of the adapter's initialization.
            shard: Function that shards the model before its weights are read. A model with an adapter is whole
                nevertheless, since it is sharded with the adapter.
        """
        base = self.base(path, dropout=self.dropout, shard=shard if self._is_plain else None)
        if self.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        policy: nn.Module = base
        if self.adapter_path is not None:
            policy = with_given_adapter(base, self.adapter_path, is_trainable=True)
        elif self.lora is not None:
            policy = with_fresh_adapter(base, self.lora, seed)
        return policy.train()

    @property
    def _is_plain(self) -> bool:
        return self.adapter_path is None and self.lora is None

    def start(self, path: str | Path, *, shard: Shard | None = None) -> nn.Module:
        """Load the initial policy, frozen and in eval mode: the base weights with a given adapter.

        Args:
            path: Folder of the initial weights.
            shard: Function that shards the model before its weights are read, if it does not have an adapter.
        """
        model: nn.Module = self.base(path, shard=shard if self.adapter_path is None else None)
        if self.adapter_path is not None:
            model = with_given_adapter(model, self.adapter_path, is_trainable=False)
        return model.requires_grad_(False).eval()
