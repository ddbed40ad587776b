"""Claiming a run directory: a run gets a new one, its own, or an error that says what is in the way."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal

from filelock import FileLock, Timeout
from omegaconf import DictConfig

from spo import slurm
from spo.errors import SET_RUN, UserError, error_line, placed_by
from spo.processes import PeerLostError, is_first_process, place, share
from spo.records import filenames
from spo.records.files import move_aside, read_mapping, remove, write_json
from spo.records.leftovers import remove_leftovers
from spo.runs.another_run import never_trained, read_identity, refuse_differences
from spo.runs.identity import changed_plugins, differences, identity
from spo.runs.processes import sweep_dir
from spo.runs.provenance import write_provenance
from spo.runs.saved_config import is_readable_config, write_config
from spo.signals import Interrupted

# Files that others put into a fresh directory: Hydra's log and settings, our lock, and temporary files of a crash.
_IGNORED = re.compile(r"\..*|.*\.log")
# Files that a run writes before its identity, so that a crash in between leaves a directory that can be claimed again.
_BEFORE_IDENTITY = {
    *(filenames.CONFIG, filenames.COMPOSED, filenames.PROVENANCE, filenames.FAILURE),
    filenames.FACTOR_SEARCH,
}
# Files that a run may write before its first step.
_BEFORE_TRAINING = (
    filenames.HISTORY,
    filenames.BAD_ROWS,
    filenames.HEALTH,
    filenames.CHECKPOINTS,
    filenames.WANDB_RUN,
)
# Most errors befall all processes alike, so a further one waits until the first one has written the same reason.
_WAIT_FOR_FIRST_SECONDS = 3.0


class Status(Enum):
    """State of the run in the directory that it claims."""

    NEW = "new"
    FINISHED = "finished"
    UNFINISHED = "unfinished"


@contextmanager
def claim(run_dir: Path, cfg: DictConfig, *, resumed: bool = False) -> Iterator[Status]:
    """Hold a run directory for the run that ``cfg`` describes.

    A new run writes its configuration, identity and provenance. ``rerun=true`` moves an older run aside. Of the
    processes of one run only the first claims, and shares the state with the others. A job of a sweep waits for
    another process that has the same run. If the run fails, ``failure.json`` gets the reason.

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
        with _failure_of_further_process(run_dir):
            yield share(Status.NEW)
        return
    with placed_by(SET_RUN, run_dir):
        if cfg.rerun:
            set_aside(run_dir)
        with locked(run_dir, wait=sweep_dir() is not None):
            remove_leftovers(run_dir)
            status = _status(run_dir, cfg, resumed)
            if status is Status.FINISHED:  # A run may fail or be interrupted after its result is written.
                (run_dir / filenames.FAILURE).unlink(missing_ok=True)
            try:
                with placed_by(SET_RUN, run_dir):
                    yield share(status)
            except PeerLostError:
                raise  # The process that failed writes its reason, or the one that watches over all of them.
            except Exception as error:
                with suppress(OSError):  # The disk may be full, and the error at hand says so.
                    write_failure(run_dir, error_line(error), traceback.format_exc())
                raise
            except Interrupted as interruption:
                with suppress(OSError):
                    write_failure(run_dir, str(interruption), kind="interrupted")
                remedy = f"the same command or spo train --resume {run_dir} resumes it"
                queued = slurm.requeue(interruption.signum)
                raise interruption.with_remedy(f"{queued}; {remedy}" if queued else remedy) from None


@contextmanager
def _failure_of_further_process(run_dir: Path) -> Iterator[None]:
    """Write ``failure.json`` if a process that is not the first fails by itself, unless it is interrupted."""
    started = datetime.now(UTC)
    try:
        yield
    except PeerLostError:
        raise
    except Exception as error:
        if _first_says(run_dir, error_line(error), started):
            raise PeerLostError("the first process of the run has failed likewise") from error
        own = place()
        with suppress(OSError):
            words = f"process {own.rank} of {own.world_size}: {error_line(error)}"
            write_failure(run_dir, words, traceback.format_exc())
        raise


def _first_says(run_dir: Path, error: str, since: datetime) -> bool:
    """Return whether the first process soon reports the same error: most errors befall all processes alike."""
    deadline = monotonic() + _WAIT_FOR_FIRST_SECONDS
    while monotonic() < deadline:
        found = read_failure(run_dir) or {}
        if found.get("error") == error and datetime.fromisoformat(str(found.get("at"))) >= since:
            return True
        sleep(0.1)
    return False


def finish(run_dir: Path, metrics: Mapping[str, float]) -> None:
    """Write ``metrics.json``, whose presence marks the run as finished."""
    write_json(run_dir / filenames.METRICS, metrics)
    (run_dir / filenames.FAILURE).unlink(missing_ok=True)


def is_finished(run_dir: Path) -> bool:
    """Return whether a run has written its result there."""
    return bool(read_mapping(run_dir / filenames.METRICS))


def write_failure(
    run_dir: Path, error: str, trace: str = "", kind: Literal["failed", "interrupted"] = "failed"
) -> None:
    """Write ``failure.json``: kind and reason of the last failure, and the number of attempts that did not finish."""
    before = (read_failure(run_dir) or {}).get("attempts")
    attempts = before + 1 if isinstance(before, int) else 1
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    failure = {"kind": kind, "error": error, "traceback": trace, "at": at, "attempts": attempts}
    write_json(run_dir / filenames.FAILURE, failure)


def read_failure(run_dir: Path) -> dict[str, Any] | None:
    """Return the content of ``failure.json``, ``None`` if there is none."""
    return read_mapping(run_dir / filenames.FAILURE)


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
    theirs = _stored_identity(run_dir, ours)
    if theirs is None:
        if foreign := _foreign_files(run_dir):
            shown = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
            raise UserError(
                f"{run_dir} holds files that do not belong to a run of spo ({shown}): "
                "choose another hydra.run.dir, or move them away"
            )
        _begin(run_dir, cfg, ours)
        return Status.NEW
    if not resumed and theirs.get("digest") != ours["digest"] and never_trained(run_dir):
        _take_over(run_dir, cfg, ours, theirs)
        return Status.NEW
    if resumed and (theirs.get("code") != ours["code"] or changed_plugins(theirs, ours)):
        # Another version may count other keys as part of a run, so only keys that both versions know are compared.
        shared = theirs.get("config", {}).keys() & ours["config"].keys()
        theirs, ours = (
            {**one, "config": {key: one["config"][key] for key in shared}, "code": None, "plugins": None}
            for one in (theirs, ours)
        )
    refuse_differences(run_dir, theirs, ours)
    _repair(run_dir, cfg)
    return Status.FINISHED if is_finished(run_dir) else Status.UNFINISHED


def _begin(run_dir: Path, cfg: DictConfig, ours: Mapping[str, Any], **facts: Any) -> None:
    """Write what a run records before it starts.

    Args:
        run_dir: Run directory.
        cfg: Configuration of the run.
        ours: Identity of the run.
        **facts: Further entries of ``provenance.json``.
    """
    write_config(run_dir, cfg)
    write_provenance(run_dir, cfg, ours, **facts)
    write_json(run_dir / filenames.IDENTITY, ours)  # Last: from here on the directory belongs to this run.


def _stored_identity(run_dir: Path, ours: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the identity of the run in a directory, ``None`` if there is no run.

    A missing or damaged file is written again if the provenance shows that the run there is ours.

    Raises:
        UserError: The file is damaged, and the run may be another one.
    """
    file = run_dir / filenames.IDENTITY
    found = read_identity(run_dir)
    if found is not None or not (file.exists() or _foreign_files(run_dir)):
        return found
    if (read_mapping(run_dir / filenames.PROVENANCE) or {}).get("identity") != ours["digest"]:
        if not (file.exists() or is_finished(run_dir)):
            return None
        raise UserError(
            f"{file} is missing or damaged, so the run in this directory cannot be told from another one: restore the "
            "file, choose another hydra.run.dir, or add rerun=true to move the run aside"
        )
    if file.exists():
        move_aside(file)
    write_json(file, ours)
    return dict(ours)


def _foreign_files(run_dir: Path) -> list[str]:
    """Return the files of a directory, unless they may be there before a run starts."""
    names = sorted(file.name for file in run_dir.iterdir() if not _IGNORED.fullmatch(file.name))
    return names if set(names) - _BEFORE_IDENTITY else []


def _repair(run_dir: Path, cfg: DictConfig) -> None:
    """Write files again that are damaged and follow from the configuration of the run.

    Folders in place of files that the run will write are moved aside.
    """
    for name in (filenames.METRICS, filenames.HISTORY, filenames.SAMPLES, filenames.COEFFICIENTS, filenames.HEALTH):
        if (run_dir / name).is_dir():
            move_aside(run_dir / name)
    if not all(is_readable_config(run_dir / name) for name in (filenames.CONFIG, filenames.COMPOSED)):
        for file in (run_dir / filenames.CONFIG, run_dir / filenames.COMPOSED):
            if file.exists() and not is_readable_config(file):
                move_aside(file)
        write_config(run_dir, cfg)
    if read_mapping(file := run_dir / filenames.PROVENANCE) is None:
        if file.exists():
            move_aside(file)
        write_provenance(run_dir, cfg, identity(cfg), written_again=datetime.now(UTC).isoformat(timespec="seconds"))


def _take_over(run_dir: Path, cfg: DictConfig, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Start a run in the directory of one that failed before its first checkpoint, and record both."""
    failure = read_failure(run_dir) or {}
    earlier = (read_mapping(run_dir / filenames.PROVENANCE) or {}).get("failed_before")
    entry = {
        "identity": theirs.get("digest"),
        "changed": differences(theirs, ours),
        **{name: failure.get(name) for name in ("error", "at", "attempts")},
    }
    print(
        f"note: the run in {run_dir} failed with another configuration before its first checkpoint; this run takes "
        f"its place, and {filenames.PROVENANCE} lists what changed",
        file=sys.stderr,
    )
    for name in (filenames.IDENTITY, filenames.FAILURE, *_BEFORE_TRAINING):
        remove(run_dir / name)
    _begin(run_dir, cfg, ours, failed_before=[*(earlier if isinstance(earlier, list) else []), entry])


def set_aside(run_dir: Path) -> None:
    """Rename a used directory to ``NAME.N``, so that a new run or iteration takes its place.

    Args:
        run_dir: Directory of a run or an iteration.

    Raises:
        UserError: Another process works in the directory.
    """
    if not run_dir.is_dir() or all(_IGNORED.fullmatch(file.name) for file in run_dir.iterdir()):
        return
    with locked(run_dir):
        numbers = range(1, 10**6)
        aside = next(path for n in numbers if not (path := run_dir.with_name(f"{run_dir.name}.{n}")).exists())
        run_dir.rename(aside)
