"""The process at hand: where it finds code, and which sweep it belongs to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Environment variable that holds the sweep directory, for jobs of the sweep in any process.
SWEEP_VARIABLE = "SPO_SWEEP"


def import_from_current_folder() -> None:
    """Let a ``_target_`` lie in the current folder. It comes last, so its files cannot replace those of a library."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def sweep_dir() -> Path | None:
    """Return the directory of the sweep that this process runs a job of, ``None`` outside sweeps."""
    directory = os.environ.get(SWEEP_VARIABLE)
    return Path(directory) if directory else None
