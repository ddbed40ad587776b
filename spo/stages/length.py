"""Length of a run in optimizer steps, once the number of its pairs is known."""

from __future__ import annotations

import copy
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from spo.processes import is_first_process
from spo.runs.saved_config import write_config
from spo.schedules.optimization import training_steps
from spo.stages.from_config import resolve_values


def with_length(cfg: DictConfig, num_pairs: int) -> DictConfig:
    """Return the resolved configuration in which ``trainer.max_steps`` is the number of steps of the run.

    Everything that depends on the length follows that key: the schedules of the learning rate, alpha and beta, the
    pages and the tracker. With ``trainer.max_epochs``, the files of the configuration are written again with the
    number. The identity of the run keeps the limits as given, so the same command continues the run.

    Args:
        cfg: Configuration of the run with its interpolations.
        num_pairs: Number of pairs to train on.
    """
    epochs = OmegaConf.select(cfg, "trainer.max_epochs")
    if epochs is not None:
        cfg = copy.deepcopy(cfg)
        cfg.trainer.max_steps = training_steps(cfg.trainer.max_steps, epochs, num_pairs, cfg.data.batch_size)
        if is_first_process():
            write_config(Path(cfg.paths.run), cfg)
    return resolve_values(cfg)
