"""Protection of a run from its trackers: they are views of it, so their failure must not end it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from spo.notes import note

GUARDED = (
    "describe",
    "log_hyperparams",
    "log_graph",
    "log_metrics",
    "save",
    "after_save_checkpoint",
    "alert",
    "show_validation_samples",
    "finalize",
    "conclude",
    "close",
)
"""Methods of loggers and trackers that a run calls."""


def make_guarded(name: str, make: Callable[[], Logger]) -> Logger | None:
    """Make a logger that stops after its first failure, with a note, instead of ending the run.

    Args:
        name: Key of the logger below ``logger``.
        make: Function that makes it.

    Returns:
        The logger, ``None`` if it cannot be made.
    """
    try:
        logger = make()
    except Exception as error:
        _note_failure(name, error)
        return None
    has_failed = False

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_failed
            if has_failed and method.__name__ != "close":
                return None
            try:
                return method(*args, **kwargs)
            except Exception as error:
                if not has_failed:
                    _note_failure(name, error)
                has_failed = True
                return None

        return call

    for method in GUARDED:
        if hasattr(logger, method):
            setattr(logger, method, guarded(getattr(logger, method)))
    return logger


def _note_failure(name: str, error: Exception) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    note(
        f"logger_failed_{name}",
        f"logger.{name} has failed and shows no more of this run ({type(error).__name__}: {reason}); the files of the "
        "run directory are complete without it",
    )


HOME_PLACES = {
    "WANDB_CACHE_DIR": ".home/wandb/cache",
    "WANDB_CONFIG_DIR": ".home/wandb/config",
    "WANDB_DATA_DIR": ".home/wandb/data",
    "HF_DATASETS_CACHE": ".home/datasets",
}
"""Variables that place what libraries write into the home folder, and where it goes if that cannot be written."""
ALTERNATIVES = {"HF_DATASETS_CACHE": ("HF_HOME", "XDG_CACHE_HOME")}
"""Further variables with which a user may have placed the same files."""


@contextmanager
def writable_home(run_dir: Path) -> Iterator[None]:
    """Let libraries write into the run directory during the block if they cannot write into the home folder.

    Args:
        run_dir: Run directory.
    """
    given = os.environ.keys()
    places = {} if _home_is_writable() else HOME_PLACES
    added = {
        name: str(run_dir / place) for name, place in places.items() if not given & {name, *ALTERNATIVES.get(name, ())}
    }
    for folder in added.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _home_is_writable() -> bool:
    try:
        with tempfile.TemporaryFile(dir=Path.home()):
            return True
    except (OSError, RuntimeError):  # A container may run under a user that does not have a home.
        return False
