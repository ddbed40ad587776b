"""Weights & Biases. This is the only file that imports it."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from spo.tracking.describe import RunDescription

Mode = Literal["auto", "online", "offline", "disabled"]


def has_api_key() -> bool:
    """Whether a key is set in the environment or in ``.netrc``, found out without asking a server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


class WandbTracker(WandbLogger):
    """A W&B run of the directory's run: curves, the resolved config, final numbers and samples as a table.

    Args:
        project: W&B project.
        entity: W&B entity, or ``None`` for the account's own.
        mode: ``"auto"`` is what ``WANDB_MODE`` says, else online with an API key and offline without one.
        save_dir: folder under which ``wandb/`` is written.
    """

    def __init__(self, project: str, entity: str | None, mode: Mode, save_dir: str) -> None:
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")  # type: ignore[assignment]
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
        super().__init__(project=project, entity=entity, mode=mode, dir=save_dir, save_dir=save_dir, settings=settings)

    def describe(self, description: RunDescription) -> None:
        """Sets name, group, job type, tags and config of the run that will be opened."""
        self._wandb_init.pop("anonymous", None)  # deprecated by wandb
        self._wandb_init.update(
            name=description.name,
            group=description.group,
            job_type=description.job_type,
            tags=description.tags,
            config=description.config,
        )

    @rank_zero_only
    def conclude(self, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Writes the summary and the samples table."""
        run = self.experiment
        if samples:
            columns = list(samples[0])
            run.log({"samples": wandb.Table(columns=columns, data=[[row.get(c) for c in columns] for row in samples])})
        run.summary.update(metrics)

    @rank_zero_only
    def close(self) -> None:
        """Finishes the run, so that the next one in this process does not continue it."""
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None
