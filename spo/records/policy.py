"""Digests of the saved policy, by which a change of its files is noticed."""

from __future__ import annotations

from pathlib import Path

from spo.errors import UserError
from spo.records import filenames
from spo.records.digests import MODEL_SUFFIXES, file_digest, folder_digests
from spo.records.files import read_json, read_mapping, write_json

POLICY_REMEDY = (
    f"restore the files, or remove {filenames.METRICS} and resume the run, which saves its policy again from the last "
    "checkpoint"
)
"""Remedy where the saved policy of a finished run is not as the run saved it."""


def looks_like_run(path: Path) -> bool:
    """Return whether a folder has a file of a run directory, of a run that has finished or not."""
    marks = (f"{filenames.POLICY}/config.json", filenames.METRICS, filenames.COMPOSED, filenames.IDENTITY)
    return any((path / mark).is_file() for mark in marks)


def saved_policy(run_dir: Path) -> Path:
    """Return the policy folder of a run.

    Args:
        run_dir: Run directory.

    Raises:
        UserError: The run has not written its policy yet, or it was removed.
    """
    folder = run_dir / filenames.POLICY
    if (folder / "config.json").is_file():
        return folder
    if read_mapping(run_dir / filenames.METRICS):
        raise UserError(f"{folder} is missing: {POLICY_REMEDY}")
    raise UserError(f"{run_dir} does not have a policy yet: finish it with spo train --resume {run_dir}")


def write_policy_digests(run_dir: Path) -> None:
    """Write ``policy.json``: the SHA-256 of each file in the policy folder of a run, and of the files beside it."""
    write_json(run_dir / filenames.POLICY_DIGESTS, _digests(run_dir))


def _digests(run_dir: Path) -> dict[str, str]:
    """Return the digests by path, relative to the policy folder."""
    beside = (file for name in (filenames.LOSS, filenames.REFERENCE) if (file := run_dir / name).is_file())
    return folder_digests(run_dir / filenames.POLICY) | {f"../{file.name}": file_digest(file) for file in beside}


def verify_policy(run_dir: Path) -> None:
    """Check that the policy folder of a run and the files beside it are as the run wrote them.

    A run of version 0.1.0 does not have digests.
    Further files are no change, unless their kind decides what a model computes.

    Raises:
        UserError: A file was changed, removed or added, or the digests cannot be read.
    """
    file, folder = run_dir / filenames.POLICY_DIGESTS, run_dir / filenames.POLICY
    if not file.exists():
        return
    recorded = read_json(file)
    if not isinstance(recorded, dict):
        raise UserError(f"{file} is damaged, so {folder} cannot be verified: {POLICY_REMEDY}")
    found = _digests(run_dir)
    changed = [f"{name} was changed" for name in found.keys() & recorded.keys() if found[name] != recorded[name]]
    changed += [f"{name} is missing" for name in recorded.keys() - found.keys()]
    changed += [f"{name} was added" for name in found.keys() - recorded.keys() if Path(name).suffix in MODEL_SUFFIXES]
    if changed:
        raise UserError(f"{folder} is not what the run saved ({', '.join(sorted(changed))}): {POLICY_REMEDY}")
