"""Policies and references: Hugging Face causal language models, adapters, and the built-in tiny one."""

from spo.models.policy import LoraSettings, ModelSpec
from spo.models.reference import (
    AdapterOffReference,
    FrozenReference,
    NoReference,
    PrecomputedReference,
    Reference,
)

__all__ = [
    "AdapterOffReference",
    "FrozenReference",
    "LoraSettings",
    "ModelSpec",
    "NoReference",
    "PrecomputedReference",
    "Reference",
]
