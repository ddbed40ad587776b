"""Refusing a run directory that holds another run, before anything slow is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spo.config.coefficients import COEFFICIENTS
from spo.errors import UserError
from spo.processes import is_first_process
from spo.records import filenames
from spo.records.files import parse_jsonl, read_mapping
from spo.records.iteration import iteration_of
from spo.records.plugins import plugin_sources
from spo.runs.identity import changed_plugins, differences, identity

_NO_CODE = {"code": None, "plugins": None}


def read_identity(run_dir: Path) -> dict[str, Any] | None:
    """Return the identity of the run in a directory, ``None`` where it is missing or damaged."""
    found = read_mapping(run_dir / filenames.IDENTITY)
    return found if found is not None and isinstance(found.get("config"), dict) else None


def never_trained(run_dir: Path) -> bool:
    """Return whether a directory holds a run that failed without a checkpoint or a logged step."""
    checkpoints = run_dir / filenames.CHECKPOINTS
    if read_mapping(run_dir / filenames.FAILURE) is None:
        return False
    if any((run_dir / name).exists() for name in (filenames.METRICS, filenames.POLICY, filenames.ADAPTER)):
        return False
    return not (checkpoints.is_dir() and any(checkpoints.iterdir())) and not _has_steps(run_dir / filenames.HISTORY)


def _has_steps(history: Path) -> bool:
    """Return whether a history has a row of training; that of step 0 is the validation before it."""
    if not history.exists():
        return False
    try:
        rows = list(parse_jsonl(history.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        return True
    return any(row is None or row.get("step") != 0 for _, row in rows)


def refuse_another_run(run_dir: Path, cfg: DictConfig) -> None:
    """Refuse a directory whose run differs from ours, from its files and our configuration alone.

    Which coefficients our method reads is known only from its code. The stored identity stands in for it: it has the
    coefficients that its own method reads. If ours is another method, a line says so anyway.

    Args:
        run_dir: Run directory, which may not exist.
        cfg: Configuration of our run.

    Raises:
        UserError: The directory holds another run; the message lists the differences.
    """
    theirs = read_identity(run_dir)
    if theirs is None or cfg.rerun or not is_first_process() or never_trained(run_dir):
        return
    used_there = {key.partition(".")[0] for key in theirs.get("config", {})}
    refuse_differences(run_dir, theirs, identity(cfg, [name for name in COEFFICIENTS if name not in used_there]))


def refuse_differences(run_dir: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` with what differs between two identities, unless nothing does."""
    if lines := differences(theirs, ours):
        iteration = iteration_of(run_dir)
        old = "the old one" if iteration is None else f"the whole iteration {iteration}"
        remedies = [f"choose another hydra.run.dir, or add rerun=true to move {old} aside"]
        only_code = not differences({**theirs, **_NO_CODE}, {**ours, **_NO_CODE})
        if only_code and theirs.get("code") == ours.get("code"):
            plugins = changed_plugins(theirs, ours)
            found = plugin_sources(plugins)
            files = ", ".join(str(found[name].path) if name in found else name for name in plugins)
            whose = "the run" if iteration is None else "the rounds so far"
            remedies.append(f"or restore {files} as {whose} used it, and the same command continues")
        # A resumed round keeps the code that began it, so the iteration would refuse it again.
        if only_code and iteration is None and read_mapping(run_dir / filenames.METRICS) is None:
            remedies.append(f"spo train --resume {run_dir} continues it with the code as it is now")
        what = [f"{run_dir} holds another run. What differs:", *(f"  - {line}" for line in lines), "; ".join(remedies)]
        raise UserError("\n".join(what))
