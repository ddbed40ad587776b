"""Log-probabilities, entropies and divergences of completions: the only place where logits become numbers."""

from spo.ops.divergence import KL_ESTIMATORS, KLEstimator, entropy, kl, token_entropy, token_kl
from spo.ops.logps import (
    Logits,
    at_least_float32,
    by_rows,
    completion_targets,
    concat_logits,
    rows_of,
    sum_per_sequence,
    token_logps,
)

__all__ = [
    "KL_ESTIMATORS",
    "KLEstimator",
    "Logits",
    "at_least_float32",
    "by_rows",
    "completion_targets",
    "concat_logits",
    "entropy",
    "kl",
    "rows_of",
    "sum_per_sequence",
    "token_entropy",
    "token_kl",
    "token_logps",
]
