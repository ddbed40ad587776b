"""Checkpoints of a run that can be resumed from."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import torch

from spo.records import filenames
from spo.runs.processes import is_first_process


def last_checkpoint(run_dir: Path) -> tuple[str | None, int]:
    """Return the newest checkpoint that can be read, and its optimizer step.

    Returns:
        Path and step; ``None`` and -1 if the run has to start again, so that no row of its history stays.
    """
    for name in (filenames.LAST_CHECKPOINT, filenames.BEST_CHECKPOINT):
        path = run_dir / filenames.CHECKPOINTS / name
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:  # torch itself does not check the checksums
                intact = archive.testzip() is None
            if intact:
                return str(path), int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])
        except Exception:  # a truncated file leads to errors of many classes
            pass
        if is_first_process():
            print(f"spo: {path} is damaged: skipped", file=sys.stderr)
    return None, -1
