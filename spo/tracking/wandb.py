"""The run at Weights & Biases."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from spo.records import filenames
from spo.records.files import flatten, read_json, write_json
from spo.tracking.describe import RunDescription
from spo.tracking.login import has_api_key

Mode = Literal["auto", "online", "offline", "disabled"]


class WandbTracker(WandbLogger):
    """A W&B run of the directory's run: curves, the resolved config, final numbers and samples as a table.

    A run keeps its id over interruptions. What it had recorded before one and W&B does not hold is logged again when it
    goes on: all of it offline, where every process writes a file of its own. The files of earlier processes are moved
    to ``wandb/superseded/``, as uploading two files with one id gives a run with half its curves, or twice some.

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

    @rank_zero_only
    def describe(self, description: RunDescription) -> None:
        """Opens the run, under the id it had before if it goes on, and logs what W&B lacks of it."""
        self._wandb_init.pop("anonymous", None)  # deprecated by wandb
        self._wandb_init.update(
            id=_run_id(description.directory / filenames.WANDB_RUN),
            name=description.name,
            group=description.group,
            job_type=description.job_type,
            tags=description.tags,
            config=description.config,
        )
        _supersede(Path(self._wandb_init["dir"]) / "wandb", self._wandb_init["id"])
        known = self.experiment.starting_step  # 0, unless the server holds the run
        for row in description.recorded:
            if row["step"] >= known:
                values = {key: math.nan if value is None else value for key, value in row.items() if key != "step"}
                self.log_metrics(values, row["step"])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs at the optimiser step, which is W&B's own step too: what it has seen of a resumed run it drops."""
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)

    @rank_zero_only
    def conclude(self, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Writes the summary and the samples table."""
        run = self.experiment
        if samples:
            rows = [flatten(row, "/") for row in samples]
            columns: list[str | int] = list(dict.fromkeys(column for row in rows for column in row))
            data = [[row.get(str(column)) for column in columns] for row in rows]
            run.log({"samples": wandb.Table(columns=columns, data=data, allow_mixed_types=True)})
        run.summary.update(metrics)

    @rank_zero_only
    def close(self) -> None:
        """Finishes the run, so that the next one in this process does not continue it."""
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None


def _run_id(file: Path) -> str:
    """The id of the W&B run that belongs to a run directory, made once."""
    if not file.exists():
        write_json(file, {"id": secrets.token_hex(4)})
    return read_json(file)["id"]


def _supersede(folder: Path, run_id: str) -> None:
    for old in sorted(folder.glob(f"*run-*-{run_id}")):
        (folder / "superseded").mkdir(exist_ok=True)
        old.rename(folder / "superseded" / old.name)
