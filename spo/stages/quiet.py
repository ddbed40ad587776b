"""A terminal without messages of the libraries."""

from __future__ import annotations

import logging
from warnings import filterwarnings as filter_warnings

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Silence tips, progress bars of loading, and warnings about choices that are deliberate here."""
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "openai", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    filter_warnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    filter_warnings("ignore", message=".*smaller than the logging interval.*")
    filter_warnings("ignore", message=".*does not have many workers.*")
    # A run without a training step evaluates given weights.
    filter_warnings("ignore", message="Total length of .* across ranks is zero.*")
    # What the module logs is reduced over processes already.
    filter_warnings("ignore", message=".*sync_dist=True.* when logging on epoch level.*")
    # Checkpoints of version 0.1.0 name their callback in another way; the identity covers the callbacks of a run.
    filter_warnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
    # peft reads this attribute of every model that it adapts.
    filter_warnings("ignore", message=".*is_gradient_checkpointing.*")
