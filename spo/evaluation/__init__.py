"""Judging a policy against its reference on held-out prompts."""

from spo.evaluation.diversity import distinct_n, distinct_samples, self_bleu
from spo.evaluation.draws import Draws, draw
from spo.evaluation.evaluate import Evaluation, Opponent, assess, draw_both, evaluate_policy
from spo.evaluation.intervals import Bootstrap, Estimate
from spo.evaluation.settings import EvaluationSettings
from spo.evaluation.winrate import at_equal_length, win_rates

__all__ = [
    "Bootstrap",
    "Draws",
    "Estimate",
    "Evaluation",
    "EvaluationSettings",
    "Opponent",
    "assess",
    "at_equal_length",
    "distinct_n",
    "distinct_samples",
    "draw",
    "draw_both",
    "evaluate_policy",
    "self_bleu",
    "win_rates",
]
