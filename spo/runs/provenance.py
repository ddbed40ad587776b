"""The provenance of a run: code, versions, digests, seeds and commands, in ``provenance.json``."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from omegaconf import DictConfig, OmegaConf

import spo
from spo.processes import is_first_process
from spo.records import filenames
from spo.records.digests import code_version
from spo.records.files import read_mapping, write_json
from spo.runs.identity import changed_plugins, plugins, prompt_file
from spo.secrets import command_line

PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "omegaconf", "wandb", "datasets", "peft", "numpy")
_INPUTS = {
    "reference_sha256": "the reference model",
    "extra_references_sha256": "the further references",
    "pairs_sha256": "the preference pairs",
    "loss_rows_sha256": "the numbers and further completions that the loss reads",
}


def write_provenance(run_dir: Path, cfg: DictConfig, parts: Mapping[str, Any], **facts: Any) -> None:
    """Write ``provenance.json`` of a new run.

    Args:
        run_dir: Run directory.
        cfg: Configuration of the run.
        parts: Identity of the run.
        **facts: Further entries, such as the failed runs whose place this one takes.
    """
    package = Path(spo.__file__)
    places = ((package.parent, package.name), (Path.cwd(), "."))
    found = next(((folder, git) for folder, tracked in places if (git := git_state(folder, tracked))), None)
    folder, git = found or (None, {"git_sha": None, "git_dirty": None})
    provenance = {
        **git,
        "git_remote": None if folder is None else git_remote(folder),
        "code": parts["code"],
        "plugins": {name: {"path": str(one.path), "sha256": one.sha256} for name, one in plugins(cfg).items()},
        "command": command_line(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "seeds": {"seed": cfg.seed, "data.seed": OmegaConf.select(cfg, "data.seed")},
        "data": {"path": OmegaConf.select(cfg, "data.path"), "sha256": parts["data"]},
        "weights": {"path": OmegaConf.select(cfg, "model.path"), "sha256": parts["weights"]},
        "adapter": {"path": OmegaConf.select(cfg, "model.adapter_path"), "sha256": parts["adapter"]},
        "regularizer_prompts": {
            "path": prompt_file(cfg),
            "sha256": parts["regularizer_prompts"],
        },
        "identity": parts["digest"],
        **facts,
    }
    write_json(run_dir / filenames.PROVENANCE, provenance)


def record_continuation(run_dir: Path, cfg: DictConfig, step: int) -> None:
    """Record in ``provenance.json`` that another version of the code or of a plugin continues a run, and print it.

    The list ``continued_with`` receives the versions, the time, the step and the command. The versions that the run
    already has add nothing.

    Args:
        run_dir: Run directory.
        cfg: Configuration of the run.
        step: Optimizer step of the checkpoint that the run continues from, 0 where it starts again.
    """
    if not is_first_process():
        return
    provenance = read_mapping(run_dir / filenames.PROVENANCE) or {}
    started = read_mapping(run_dir / filenames.IDENTITY) or {}
    continued = _mappings(provenance.get("continued_with"))
    now = {"code": code_version(), "plugins": {name: one.sha256 for name, one in plugins(cfg).items()}}
    last = continued[-1] if continued else started
    edited = changed_plugins(last, now)
    if now["code"] == last.get("code") and not edited:
        return
    if now["code"] != last.get("code"):
        words = f"code {started.get('code')} started this run; it continues at step {step} with code {now['code']}"
        print(f"note: {words}", file=sys.stderr)
    if edited:
        names = " and ".join(edited)
        print(f"note: the code of {names} has changed; this run continues at step {step} with it", file=sys.stderr)
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    entry = {**now, "at": at, "step": step, "command": command_line(sys.argv)}
    write_json(run_dir / filenames.PROVENANCE, {**provenance, "continued_with": [*continued, entry]})


def record_inputs(run_dir: Path, inputs: Mapping[str, Any], step: int = 0) -> None:
    """Record the digests of the reference model and the preference pairs in ``provenance.json``.

    A resumed run may make them again, on another machine or with other code. If they differ from those of the steps
    before, a note is printed and the list ``earlier_inputs`` receives the old digests.

    Args:
        run_dir: Run directory.
        inputs: Digests ``reference_sha256`` and ``pairs_sha256``, and those of further references by name
            (``extra_references_sha256``) where there are some.
        step: Optimizer step of the checkpoint that the run continues from, 0 where it starts.
    """
    provenance = read_mapping(run_dir / filenames.PROVENANCE) or {}
    before = provenance.get("inputs")
    if isinstance(before, dict) and before != inputs and step > 0:
        changed = [words for key, words in _INPUTS.items() if before.get(key) != inputs.get(key)]
        print(
            f"note: {' and '.join(changed)} of this run were made again and differ from those of its first {step} "
            f"steps; {filenames.PROVENANCE} has the digests of both",
            file=sys.stderr,
        )
        earlier = _mappings(provenance.get("earlier_inputs"))
        provenance["earlier_inputs"] = [*earlier, {**before, "until_step": step}]
    write_json(run_dir / filenames.PROVENANCE, {**provenance, "inputs": dict(inputs)})


def record_stop(run_dir: Path, words: str | None) -> None:
    """Record in ``provenance.json`` why training stopped before its last step.

    Args:
        run_dir: Run directory.
        words: Sentence for a person; ``None`` if training took all of its steps, which removes an earlier sentence.
    """
    provenance = read_mapping(run_dir / filenames.PROVENANCE) or {}
    provenance.pop("stopped", None)
    stopped = {} if words is None else {"stopped": words}
    write_json(run_dir / filenames.PROVENANCE, provenance | stopped)


def _mappings(value: Any) -> list[dict[str, Any]]:
    """Return the entries of a list in the file, none where a person or a fault has changed it to something else."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def git_state(folder: Path, tracked: str = ".") -> dict[str, Any] | None:
    """Return the commit of the repository around a folder, and whether the repository has other changes.

    Args:
        folder: Folder to look in.
        tracked: File in the folder that must belong to the repository. An installed package may lie inside a repository
            that has nothing to do with it.

    Returns:
        ``git_sha`` and ``git_dirty``, or ``None`` if there is no such repository.
    """
    sha = _git(folder, "rev-parse", "HEAD")
    if sha is None or (tracked != "." and _git(folder, "ls-files", "--error-unmatch", tracked) is None):
        return None
    changes = _git(folder, "status", "--porcelain")
    return {"git_sha": sha, "git_dirty": None if changes is None else bool(changes)}


def git_remote(folder: Path) -> str | None:
    """Return the address of the remote ``origin`` without user, password and query; ``None`` for a folder or no remote.

    Args:
        folder: Folder in the repository.
    """
    address = _git(folder, "config", "--get", "remote.origin.url") or ""
    if "://" in address:
        parts = urlsplit(address)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path, "", "")) if host else None
    server = re.fullmatch(r"(?:[^/@]*@)?([^/@:]+:.+)", address)  # the short form of ssh, such as git@github.com:a/b.git
    return f"git@{server[1]}" if server else None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a command of git, ``None`` if it fails."""
    # Otherwise `git status` would write the index, and a full disk would leave its lock in the repository.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
