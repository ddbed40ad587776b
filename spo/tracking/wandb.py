"""The tracker for Weights & Biases."""

from __future__ import annotations

import math
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from spo.records import filenames
from spo.records.files import flatten, read_json, write_json
from spo.secrets import scrubbed, without_secrets
from spo.tracking.describe import RunDescription
from spo.tracking.login import has_api_key

Mode = Literal["auto", "online", "offline", "disabled"]


class WandbTracker(WandbLogger):
    """A W&B run with curves, the resolved configuration, final metrics, and samples as a table.

    A resumed run has the same id as before. Rows of its history that W&B does not have are logged again: the missing
    ones online, all of them offline, where each process writes its own file. Files of earlier processes move to
    ``wandb/superseded/``. If two files with one id were uploaded, the run would lose or duplicate parts of its curves.

    Args:
        project: W&B project.
        entity: W&B entity, ``None`` for that of the account.
        mode: Mode of W&B. ``"auto"`` means ``WANDB_MODE`` if set, else online with an API key and offline without one.
        save_dir: Folder in which ``wandb/`` is written.
    """

    def __init__(self, project: str, entity: str | None, mode: Mode, save_dir: str) -> None:
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")  # type: ignore[assignment]
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
        super().__init__(project=project, entity=entity, mode=mode, dir=save_dir, save_dir=save_dir, settings=settings)

    @rank_zero_only
    def describe(self, description: RunDescription) -> None:
        """Open the run, with its earlier id if it is resumed, and log the rows that W&B does not have."""
        self._wandb_init.pop("anonymous", None)  # wandb deprecates it
        self._wandb_init.update(
            id=_run_id(description.directory / filenames.WANDB_RUN),
            # As W&B's own client does, its variables decide over names that no key of the configuration sets.
            name=os.environ.get("WANDB_NAME") or description.name,
            group=os.environ.get("WANDB_RUN_GROUP") or description.group,
            job_type=os.environ.get("WANDB_JOB_TYPE") or description.job_type,
            tags=list(dict.fromkeys([*description.tags, *filter(None, os.environ.get("WANDB_TAGS", "").split(","))])),
            config=description.config,
        )
        self._wandb_init.update(scrubbed(self._wandb_init))
        _supersede(Path(self._wandb_init["dir"]) / "wandb", self._wandb_init["id"])
        typed = sys.argv
        sys.argv = without_secrets(typed)  # The client records the command line.
        try:
            known = self.experiment.starting_step  # 0 unless the server has the run
        finally:
            sys.argv = typed
        for row in description.recorded:
            if row["step"] >= known:
                values = {key: math.nan if value is None else value for key, value in row.items() if key != "step"}
                self.log_metrics(values, row["step"])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log at the optimizer step.

        It is W&B's own step too, so W&B drops rows of a resumed run that it has already.
        """
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)

    @rank_zero_only
    def conclude(self, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Write the summary and the table of samples."""
        run = self.experiment
        if samples:
            rows = [flatten(row, "/") for row in samples]
            columns: list[str | int] = list(dict.fromkeys(column for row in rows for column in row))
            data = [[scrubbed(row.get(str(column))) for column in columns] for row in rows]
            run.log({"samples": wandb.Table(columns=columns, data=data, allow_mixed_types=True)})
        run.summary.update(metrics)

    @rank_zero_only
    def close(self) -> None:
        """Finish the run, so that the next one in this process does not continue it."""
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None


def _run_id(file: Path) -> str:
    """Return the id of the W&B run that belongs to a run directory, drawn on the first call."""
    if not file.exists():
        write_json(file, {"id": secrets.token_hex(4)})
    return read_json(file)["id"]


def _supersede(folder: Path, run_id: str) -> None:
    for old in sorted(folder.glob(f"*run-*-{run_id}")):
        (folder / "superseded").mkdir(exist_ok=True)
        old.rename(folder / "superseded" / old.name)
