"""The data that flows between data sets, models, losses and metrics, with shapes.

Symbols used in every shape comment: ``B`` pairs or lists, ``n`` completions of the longest list (2 for pairs), ``N``
sequences, ``T`` padded tokens, ``M`` completion tokens of a batch laid end to end, ``V`` vocabulary.
"""

from spo.types.batch import PreferenceBatch, Window
from spo.types.logps import CompletionLogps, LabelledLogps, ListLogps, Logps, PairLogps
from spo.types.movable import Movable, copy_async
from spo.types.sequences import Sequences, long_tensor, pad_prompts, pad_sequences

__all__ = [
    "CompletionLogps",
    "LabelledLogps",
    "ListLogps",
    "Logps",
    "Movable",
    "PairLogps",
    "PreferenceBatch",
    "Sequences",
    "Window",
    "copy_async",
    "long_tensor",
    "pad_prompts",
    "pad_sequences",
]
