"""Evaluation of a policy against its reference on held-out prompts.

Names that need torch are imported from their own modules, such as `spo.evaluation.assess`.
"""

from spo.evaluation.diversity import distinct_n, distinct_samples, self_bleu
from spo.evaluation.settings import EvaluationSettings
from spo.evaluation.winrate import at_equal_length, verdict_of_rewards, win_rates

__all__ = [
    "EvaluationSettings",
    "at_equal_length",
    "distinct_n",
    "distinct_samples",
    "self_bleu",
    "verdict_of_rewards",
    "win_rates",
]
