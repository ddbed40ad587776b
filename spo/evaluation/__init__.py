"""Judging a policy against its reference on held-out prompts."""

from spo.evaluation.diversity import distinct_n, self_bleu
from spo.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate_policy
from spo.evaluation.intervals import bootstrap_interval

__all__ = [
    "Evaluation",
    "EvaluationSettings",
    "bootstrap_interval",
    "distinct_n",
    "evaluate_policy",
    "self_bleu",
]
