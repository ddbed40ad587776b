"""Preference data: sources of rows, their tokens, splits and batches.

What needs torch or lightning is imported from its own module (`spo.data.collate`, `spo.data.datamodule`).
"""

from spo.data.rendering import Dropped, Renderer, TokenizedPair, prompt_id
from spo.data.rows import SPLITS, Completer, Completion, DataError, Reward, Row, RowError, Source
from spo.data.sources import FileSource, HHSource, HubSource, NoPreference, RankedFileSource
from spo.data.splits import EvalPrompt, PreparedPairs, eval_prompts, prepare

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
