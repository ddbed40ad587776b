"""Preference data: sources of rows, their tokens, splits and batches.

Import :mod:`spo.data.collate` and :mod:`spo.data.datamodule` by their own names, since they need torch and lightning.
"""

from spo.data.files import FileSource, HHSource
from spo.data.hub import HubSource
from spo.data.labelled import LabelledFileSource
from spo.data.ranked import RankedFileSource
from spo.data.rendering import Dropped, Renderer, TokenizedPair, prompt_id
from spo.data.rows import SPLITS, Completer, Completion, DataError, Reward, Row, RowError
from spo.data.source import Source
from spo.data.splits import EvalPrompt, PreparedPairs, eval_prompts, prepare
from spo.data.tables import NoPreference

__all__ = [
    "SPLITS",
    "Completer",
    "Completion",
    "DataError",
    "Dropped",
    "EvalPrompt",
    "FileSource",
    "HHSource",
    "HubSource",
    "LabelledFileSource",
    "NoPreference",
    "PreparedPairs",
    "RankedFileSource",
    "Renderer",
    "Reward",
    "Row",
    "RowError",
    "Source",
    "TokenizedPair",
    "eval_prompts",
    "prepare",
    "prompt_id",
]
