"""The tracker for Weights & Biases."""

from __future__ import annotations

import math
import os
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from spo.metrics.catalogue import find_logged, without_comparisons
from spo.records import filenames
from spo.records.files import flatten, read_json, read_jsonl, write_json
from spo.secrets import scrubbed, without_secrets
from spo.tracking.artifacts import data_artifact, policy_artifact
from spo.tracking.describe import RunDescription
from spo.tracking.login import has_api_key

Mode = Literal["auto", "online", "offline", "disabled"]
BEST = "best/"
"""Beginning of the keys of the summary that hold the best value so far; W&B itself shows the last under its key."""
MAX_TAG_CHARACTERS = 64
"""Length of the longest tag that W&B accepts."""


class WandbTracker(WandbLogger):
    """A W&B run with curves, the resolved configuration, final and best metrics, samples as tables, and alerts.

    A resumed run has the same id as before. Rows of its history that W&B does not have are logged again: the missing
    ones online, all of them offline, where each process writes its own file. Files of earlier processes move to
    ``wandb/superseded/``. If two files with one id were uploaded, the run would lose or duplicate parts of its curves.

    Args:
        project: W&B project.
        entity: W&B entity, ``None`` for that of the account.
        mode: Mode of W&B. ``"auto"`` means ``WANDB_MODE`` if set, else online with an API key and offline without one.
        save_dir: Folder in which ``wandb/`` is written.
        notes: Text about the run, ``None`` for its command.
        log_model: Add the saved policy and the digests of the data as artifacts. Checkpoints are never uploaded.
    """

    def __init__(
        self,
        project: str,
        entity: str | None,
        mode: Mode,
        save_dir: str,
        notes: str | None = None,  # Runs of version 0.1 do not have this key and the next one.
        log_model: bool = False,
    ) -> None:
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")  # type: ignore[assignment]
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True)
        super().__init__(project=project, entity=entity, mode=mode, dir=save_dir, save_dir=save_dir, settings=settings)
        self.notes, self.adds_artifacts = notes, log_model
        self._best: dict[str, float] = {}
        self._first_step = 0  # Step of W&B at which step 0 of the run is shown.
        self._server_step = 0  # Everything before this step of W&B is on the server.
        self._validation_samples: Sequence[Mapping[str, Any]] = ()

    @rank_zero_only
    def describe(self, description: RunDescription) -> None:
        """Open the run, with its earlier id if it is resumed, and log the rows that W&B does not have."""
        self._description, self._first_step = description, description.first_step
        provenance = description.provenance
        self._wandb_init.pop("anonymous", None)  # wandb deprecates it
        self._wandb_init.update(
            id=_run_id(description.directory / filenames.WANDB_RUN),
            # As W&B's own client does, its variables decide over names that no key of the configuration sets.
            name=os.environ.get("WANDB_NAME") or description.name,
            group=os.environ.get("WANDB_RUN_GROUP") or description.group,
            job_type=os.environ.get("WANDB_JOB_TYPE") or description.job_type,
            tags=_tags([*description.tags, *os.environ.get("WANDB_TAGS", "").split(",")]),
            notes=self.notes or provenance.get("command"),
            config=description.config,
        )
        self._wandb_init.update(scrubbed(self._wandb_init))
        # The client would read the repository around the current folder, which need not be the one of the code.
        settings = self._wandb_init["settings"]
        settings.git_commit = provenance.get("git_sha") or settings.git_commit
        settings.git_remote_url = provenance.get("git_remote") or settings.git_remote_url
        _supersede(Path(self._wandb_init["dir"]) / "wandb", self._wandb_init["id"])
        typed = sys.argv
        sys.argv = without_secrets(typed)  # The client records the command line.
        try:
            run = self.experiment
        finally:
            sys.argv = typed
        if not run.disabled and not run.offline:
            print(f"W&B: {run.url}")
        self._server_step = run.starting_step  # 0 unless the server has the run
        for row in description.recorded:
            values = {key: math.nan if value is None else value for key, value in row.items() if key != "step"}
            if row["step"] + self._first_step >= self._server_step:
                self.log_metrics(values, row["step"])
            else:
                self._show_best(values)
        if (file := description.directory / filenames.VALIDATION_SAMPLES).exists():
            self._validation_samples = read_jsonl(file)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log at the optimizer step, which continues that of the earlier rounds of an iteration.

        It is W&B's own step too, so W&B drops rows of a resumed run that it has already.
        """
        shown = None if step is None else step + self._first_step
        self.experiment.log({**metrics, "trainer/global_step": shown}, step=shown)
        self._show_best(metrics)

    def _show_best(self, metrics: Mapping[str, float]) -> None:
        """Write metrics of validations that are better than all before into the summary.

        W&B can hold the best value under the key of the metric (``define_metric``), but then as a mapping, which would
        take the place of the final number.
        """
        better = {}
        for key, value in metrics.items():
            entry = find_logged(key) if key.startswith(("val/", "exact/")) else None
            if entry is None or entry.better is None or not math.isfinite(value):
                continue
            sign = 1 if entry.better == "higher" else -1
            # A metric such as the KL starts at its best value, 0, which says nothing about training.
            if key not in self._best and sign < 0 and value == 0:
                self._best[key] = value
            elif key not in self._best or sign * value > sign * self._best[key]:
                better[f"{BEST}{key}"] = self._best[key] = value
        if better:
            self.experiment.summary.update(better)

    @rank_zero_only
    def alert(self, title: str, text: str, step: int) -> None:
        """Send an alert, unless an earlier process of this run has sent it."""
        if step + self._first_step >= self._server_step:
            self.experiment.alert(title=title, text=scrubbed(text), level="WARN")

    @rank_zero_only
    def show_validation_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the table of the samples of all validations so far, if their number has doubled.

        Each log writes the whole table, so logging it at every validation would write a number of rows that grows with
        the square of the validations.
        """
        self._validation_samples = rows
        steps = [row["step"] for row in rows]
        if len(set(steps)).bit_count() == 1:
            self.experiment.log({"validation_samples": _table(rows)}, step=max(steps) + self._first_step)

    @rank_zero_only
    def conclude(self, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Write the summary, the tables of samples and, where asked for, the artifacts."""
        run = self.experiment
        tables = {"samples": samples, "validation_samples": self._validation_samples}
        if shown := {key: _table(rows) for key, rows in tables.items() if rows}:
            run.log(shown)
        run.summary.update(metrics)
        self._show_best(metrics)
        if self.adds_artifacts and not run.disabled:
            data = data_artifact(self._description)
            # The client marks an artifact as an input of a run only with a network.
            run.log_artifact(data) if run.offline else run.use_artifact(data)
            run.log_artifact(policy_artifact(self._description.directory, run.id, metrics))

    @rank_zero_only
    def close(self) -> None:
        """Finish the run, so that the next one in this process does not continue it; show how to upload it."""
        if self._experiment is not None:
            run, self._experiment = self._experiment, None
            folder = Path(run.sync_dir).absolute() if run.offline and not run.disabled else None
            run.finish()
            if folder is not None:
                shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
                print(f"W&B (offline): wandb sync {shlex.quote(str(shown))}")


def _tags(tags: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(tag[:MAX_TAG_CHARACTERS] for tag in tags if tag))


def _table(rows: Sequence[Mapping[str, Any]]) -> wandb.Table:
    """Return rows of samples as a table; nested mappings become columns such as ``opponents/chosen/verdict``.

    The list of all completions of the reference is left out: a cell shows one text, and ``verdict`` is their mean.
    """
    flat = [flatten(without_comparisons(row), "/") for row in rows]
    columns: list[str | int] = list(dict.fromkeys(column for row in flat for column in row))
    data = [[scrubbed(row.get(str(column))) for column in columns] for row in flat]
    return wandb.Table(columns=columns, data=data, allow_mixed_types=True)


def _run_id(file: Path) -> str:
    """Return the id of the W&B run that belongs to a run directory, drawn on the first call."""
    if not file.exists():
        write_json(file, {"id": secrets.token_hex(4)})
    return read_json(file)["id"]


def _supersede(folder: Path, run_id: str) -> None:
    for old in sorted(folder.glob(f"*run-*-{run_id}")):
        (folder / "superseded").mkdir(exist_ok=True)
        old.rename(folder / "superseded" / old.name)
