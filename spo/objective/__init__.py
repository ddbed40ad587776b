"""The parts that the objective of a step is the sum of: the pairs, and what a regularizer adds."""

from spo.objective.base import Divergence, Part, Prompts, Run, Term
from spo.objective.enumerated import EnumeratedDivergence, Enumeration
from spo.objective.joint import concat_logps
from spo.objective.learned import parameters_of
from spo.objective.pairs import PairDivergence, Pairs, check_outputs, score
from spo.objective.samples import SampleDivergence, SampleSettings
from spo.objective.scored import ScoredBatch, loss_inputs

__all__ = [
    "Divergence",
    "EnumeratedDivergence",
    "Enumeration",
    "PairDivergence",
    "Pairs",
    "Part",
    "Prompts",
    "Run",
    "SampleDivergence",
    "SampleSettings",
    "ScoredBatch",
    "Term",
    "check_outputs",
    "concat_logps",
    "loss_inputs",
    "parameters_of",
    "score",
]
