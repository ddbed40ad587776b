"""Policies and references: Hugging Face causal language models, adapters, and the built-in small ones."""

from spo.models.adapters import LoraSettings
from spo.models.embedder import EncoderEmbedder
from spo.models.policy import ModelSpec
from spo.models.reference import (
    AdapterOffReference,
    CachedReference,
    FollowingReference,
    FrozenReference,
    NoReference,
    PrecomputedReference,
    Reference,
)
from spo.models.tabular import TabularConfig, TabularForCausalLM

__all__ = [
    "AdapterOffReference",
    "CachedReference",
    "EncoderEmbedder",
    "FollowingReference",
    "FrozenReference",
    "LoraSettings",
    "ModelSpec",
    "NoReference",
    "PrecomputedReference",
    "Reference",
    "TabularConfig",
    "TabularForCausalLM",
]
