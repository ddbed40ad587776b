"""Regularizers: divergences of the policy from the reference, chosen independently of the loss."""

from spo.regularizers.base import NoRegularizer, PairRegularizer, Regularizer, SampleRegularizer
from spo.regularizers.enumerated_kl import EnumeratedKL
from spo.regularizers.global_kl import GlobalKL
from spo.regularizers.local_kl import LocalKL

__all__ = [
    "EnumeratedKL",
    "GlobalKL",
    "LocalKL",
    "NoRegularizer",
    "PairRegularizer",
    "Regularizer",
    "SampleRegularizer",
]
