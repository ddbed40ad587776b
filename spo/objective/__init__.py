"""The parts that the objective of a step is the sum of: the pairs, and what a regularizer adds."""

from spo.objective.base import Divergence, Part, Prompts, Run, StepTerm
from spo.objective.enumerated import EnumeratedDivergence, Enumeration
from spo.objective.joint import concat_logps
from spo.objective.learned import parameters_of
from spo.objective.pairs import PairDivergence, Pairs, score
from spo.objective.samples import SampleDivergence, SampleSettings
from spo.objective.scored import ScoredBatch, loss_inputs, metrics_of

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
    "StepTerm",
    "concat_logps",
    "loss_inputs",
    "metrics_of",
    "parameters_of",
    "score",
]
