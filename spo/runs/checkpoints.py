"""Checkpoints of a run that can be resumed from."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spo.callbacks.checkpoint import HISTORY_KEY, STEP_FILES
from spo.errors import UserError
from spo.models.sharded_state import read_meta
from spo.notes import note
from spo.processes import is_first_process
from spo.records import filenames
from spo.records.checkpoint_folders import RUN_KEY, is_intact, settle_checkpoints
from spo.records.files import read_json
from spo.runs.identity import known_digests


class ResumePoint(NamedTuple):
    """The checkpoint that a run resumes from.

    Attributes:
        path: Path of the checkpoint; ``None`` if the run has to start again.
        step: Optimizer step of the checkpoint; -1 if the run has to start again, so that no row of its history stays.
        history: Text of ``history.jsonl`` up to the step; ``None`` for a checkpoint of version 0.1.0.
    """

    path: str | None
    step: int
    history: str | None = None


def last_checkpoint(run_dir: Path, folder: Path | None = None) -> ResumePoint:
    """Return the last checkpoint of a run; if it is damaged, the newest of the others, with a note.

    What a process that was killed left between two names of a folder gets its name first, so the caller is the only
    process that uses the checkpoints.

    Args:
        run_dir: Run directory.
        folder: Folder of the checkpoints, ``None`` for that in the run directory.

    Raises:
        UserError: A checkpoint is that of another run.
    """
    folder = run_dir / filenames.CHECKPOINTS if folder is None else folder
    settle_checkpoints(folder, (filenames.LAST_CHECKPOINT, filenames.BEST_CHECKPOINT))
    last = folder / filenames.LAST_CHECKPOINT
    others = [folder / filenames.BEST_CHECKPOINT, *folder.glob(STEP_FILES)]
    damaged = []
    for paths in ([last], others):
        found: list[ResumePoint] = []
        for path in paths:
            if not path.exists():
                continue
            checkpoint = read_checkpoint(path)
            if checkpoint is None:
                damaged.append(path)
                continue
            _refuse_another_run(run_dir, path, checkpoint)
            packed = checkpoint.get(HISTORY_KEY)
            history = None if packed is None else zlib.decompress(packed.numpy().tobytes()).decode()
            found.append(ResumePoint(str(path), int(checkpoint["global_step"]), history))
        if found:
            point = max(found, key=lambda one: one.step)
            if damaged:
                _note_damage(damaged, f"the run resumes from {Path(str(point.path)).name} at step {point.step}")
            return point
    if damaged:
        _note_damage(damaged, "the run starts again, since it does not have another checkpoint")
    return ResumePoint(None, -1)


def read_checkpoint(path: Path) -> Mapping[str, Any] | None:
    """Return the content of a checkpoint, without reading its tensors into memory; ``None`` if it is damaged.

    That of a folder lacks the weights, and the tensors of the optimizers.
    """
    try:
        if path.is_dir():
            return read_meta(path) if is_intact(path) else None
        with zipfile.ZipFile(path) as archive:  # torch itself does not check the checksums
            if archive.testzip() is not None:
                return None
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return checkpoint if "global_step" in checkpoint else None
    except Exception:  # a truncated file leads to errors of many classes
        return None


def is_of_run(run_dir: Path, checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint carries the identity of a run; one of version 0.1.0 does not carry any."""
    carried, known = checkpoint.get(RUN_KEY), known_digests(read_json(run_dir / filenames.IDENTITY))
    return carried is None or not known or carried in known


def _refuse_another_run(run_dir: Path, path: Path, checkpoint: Mapping[str, Any]) -> None:
    if not is_of_run(run_dir, checkpoint):
        raise UserError(
            f"{path} is the checkpoint of another run: put that of this run back, or remove it to resume from "
            "another checkpoint or start again"
        )


def _note_damage(paths: list[Path], consequence: str) -> None:
    if is_first_process():
        names = ", ".join(map(str, paths))
        verb = "is" if len(paths) == 1 else "are"
        note("damaged_checkpoints", f"{names} {verb} damaged: {consequence}", len(paths))
