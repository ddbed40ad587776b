"""``spo inspect``: rows of the training split as the model reads them."""

from __future__ import annotations

from omegaconf import DictConfig

from spo.pages.rows import show_rows
from spo.stages.from_config import resolve_values
from spo.stages.prepare import prepare_run


def inspect(cfg: DictConfig, limit: int) -> None:
    """Print the first rows of the training split as tokens, masks and text.

    Args:
        cfg: Configuration of the run.
        limit: Number of rows.
    """
    prepared = prepare_run(resolve_values(cfg))
    show_rows(prepared.pairs.train, prepared.tokenizer, limit, prepared.pairs.counts)
