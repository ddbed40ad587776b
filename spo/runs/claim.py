"""Claiming a run directory: a run gets a new one, its own, or an error that says what is in the way."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from spo.errors import UserError, error_line
from spo.records import filenames
from spo.records.files import read_json, write_json
from spo.runs.another_run import refuse_differences
from spo.runs.identity import changed_plugins, identity
from spo.runs.processes import is_first_process, sweep_dir
from spo.runs.provenance import write_provenance
from spo.runs.saved_config import write_config
from spo.signals import Interrupted

# Files that others put into a fresh directory: Hydra's log and settings, our lock, and temporary files of a crash.
_IGNORED = re.compile(r"\..*|.*\.log")
# Files that a run writes before its identity, so that a crash in between leaves a directory that can be claimed again.
_BEFORE_IDENTITY = {filenames.CONFIG, filenames.COMPOSED, filenames.PROVENANCE, filenames.FAILURE}


class Status(Enum):
    """State of the run in the directory that it claims."""

    NEW = "new"
    FINISHED = "finished"
    UNFINISHED = "unfinished"


@contextmanager
def claim(run_dir: Path, cfg: DictConfig, *, resumed: bool = False) -> Iterator[Status]:
    """Hold a run directory for the run that ``cfg`` describes.

    A new run writes its configuration, identity and provenance. ``rerun=true`` moves an older run aside. Of the
    processes of one run only the first claims; the others read the state. A job of a sweep waits for another process
    that has the same run. If the run fails, ``failure.json`` gets the reason.

    Args:
        run_dir: Run directory, created where it is missing.
        cfg: Configuration of the run.
        resumed: Continue the run in it by explicit request, with another version of the code or of plugins too.

    Yields:
        The state of the run.

    Raises:
        UserError: The directory holds another run, files of something else, or a run that another process has.
    """
    if not is_first_process():
        folder = OmegaConf.select(cfg, "callbacks.checkpoint.dirpath") or run_dir / filenames.CHECKPOINTS
        started = Path(folder).is_dir() and not cfg.rerun
        done = (run_dir / filenames.METRICS).exists() and not cfg.rerun
        yield Status.FINISHED if done else Status.UNFINISHED if started else Status.NEW
        return
    if cfg.rerun:
        _move_aside(run_dir)
    with locked(run_dir, wait=sweep_dir() is not None):
        status = _status(run_dir, cfg, resumed)
        try:
            yield status
        except Exception as error:
            write_failure(run_dir, error_line(error), traceback.format_exc())
            raise
        except Interrupted as interruption:
            write_failure(run_dir, str(interruption), kind="interrupted")
            raise interruption.with_remedy(f"the same command or spo train --resume {run_dir} resumes it") from None


def finish(run_dir: Path, metrics: Mapping[str, float]) -> None:
    """Write ``metrics.json``, whose presence marks the run as finished."""
    write_json(run_dir / filenames.METRICS, metrics)
    (run_dir / filenames.FAILURE).unlink(missing_ok=True)


def is_finished(run_dir: Path) -> bool:
    """Return whether a run has written its result there."""
    return read_json(run_dir / filenames.METRICS) is not None


def write_failure(
    run_dir: Path, error: str, trace: str = "", kind: Literal["failed", "interrupted"] = "failed"
) -> None:
    """Write ``failure.json``: kind and reason of the last failure, and the number of attempts that did not finish."""
    attempts = (read_failure(run_dir) or {}).get("attempts", 0) + 1
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    failure = {"kind": kind, "error": error, "traceback": trace, "at": at, "attempts": attempts}
    write_json(run_dir / filenames.FAILURE, failure)


def read_failure(run_dir: Path) -> dict[str, Any] | None:
    """Return the content of ``failure.json``, ``None`` if there is none."""
    return read_json(run_dir / filenames.FAILURE)


def is_locked(run_dir: Path) -> bool:
    """Return whether a process works in a run directory."""
    lock = FileLock(run_dir / filenames.RUN_LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # In a missing directory nobody can have the lock.
        return run_dir.is_dir()
    lock.release()
    return False


@contextmanager
def locked(run_dir: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a run directory, which is created where it is missing.

    Args:
        run_dir: Run directory.
        wait: Wait for a process that has the lock, instead of failing.

    Raises:
        UserError: Another process has the lock.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / filenames.RUN_LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            words = f"another process is at work in {run_dir}: wait for it, or choose another hydra.run.dir"
            raise UserError(words) from None
        print(f"spo: another process is at work in {run_dir}: waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _status(run_dir: Path, cfg: DictConfig, resumed: bool) -> Status:
    ours = identity(cfg)
    theirs = read_json(run_dir / filenames.IDENTITY)
    if theirs is None:
        foreign = sorted(file.name for file in run_dir.iterdir() if not _IGNORED.fullmatch(file.name))
        if set(foreign) - _BEFORE_IDENTITY:
            shown = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
            raise UserError(
                f"{run_dir} holds files that do not belong to a run of spo ({shown}): "
                "choose another hydra.run.dir, or move them away"
            )
        write_config(run_dir, cfg)
        write_provenance(run_dir, cfg, ours)
        write_json(run_dir / filenames.IDENTITY, ours)  # Last: from here on the directory belongs to this run.
        return Status.NEW
    if resumed and (theirs.get("code") != ours["code"] or changed_plugins(theirs, ours)):
        # Another version may count other keys as part of a run, so only keys that both versions know are compared.
        shared = theirs.get("config", {}).keys() & ours["config"].keys()
        theirs, ours = (
            {**one, "config": {key: one["config"][key] for key in shared}, "code": None, "plugins": None}
            for one in (theirs, ours)
        )
    refuse_differences(run_dir, theirs, ours)
    return Status.FINISHED if is_finished(run_dir) else Status.UNFINISHED


def _move_aside(run_dir: Path) -> None:
    if not run_dir.is_dir() or all(_IGNORED.fullmatch(file.name) for file in run_dir.iterdir()):
        return
    with locked(run_dir):
        numbers = range(1, 10**6)
        aside = next(path for n in numbers if not (path := run_dir.with_name(f"{run_dir.name}.{n}")).exists())
        run_dir.rename(aside)
