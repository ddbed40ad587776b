"""The run directory: what a run is (its identity), and what happens in a directory that is used already."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import spo
from spo.config.coefficients import unused_coefficients
from spo.config.compose import compose, expand_numbers, parse, register_resolvers
from spo.errors import ConfigProblems, UserError, error_line
from spo.records.cache import path_digest

CONFIG, COMPOSED, IDENTITY, METRICS, PROVENANCE, FAILURE, LOCK = (
    "config.yaml",
    "composed.yaml",
    "identity.json",
    "metrics.json",
    "provenance.json",
    "failure.json",
    ".lock",
)
# Holds the directory of the sweep for its jobs, in whatever process they run.
SWEEP_VARIABLE = "SPO_SWEEP"
# Parts of a configuration that do not change what a run computes.
NOT_IDENTITY = ("paths", "hydra", "launcher", "logger", "rerun", "speed", "tags", "threads")
# How fast a judge is asked, how often, and at what price, is no part of its answers.
ASKED_HOW: tuple[str, ...] = ("attempts", "batch_size", "cache", "concurrency", "device", "input_price", "max_retries")
ASKED_HOW += ("max_unanswered", "output_price", "requests_per_minute", "timeout_s")
NOT_IDENTITY_KEYS: tuple[str, ...] = ("evaluation.batch_size",)
NOT_IDENTITY_KEYS += tuple(f"judge.{name}" for name in ASKED_HOW)
# What a run may still change when it goes on.
RESUMABLE = ("trainer.max_steps", "logger", "strategy")
UNTIL_FINISHED = ("judge", "evaluation")
PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "omegaconf", "wandb", "datasets", "peft", "numpy")
REDACTED = "<redacted>"
# Files that others put into a fresh directory: Hydra's log and settings, our lock and what a crash left half written.
_IGNORED = re.compile(r"\..*|.*\.log")
_SECRET_KEY = re.compile(
    r"api_?key|passw(or)?d|secret|credential|^token$|\.token$|(access|auth|bearer|hub|hf|wandb)_?token", re.IGNORECASE
)
_SECRET_VARIABLE = re.compile(r"oc\.env:\s*\w*(API_?KEY|TOKEN|PASSW(OR)?D|SECRET|CREDENTIAL)", re.IGNORECASE)


class Status(Enum):
    """What a run directory holds of the run that claims it."""

    NEW = "new"
    FINISHED = "finished"
    UNFINISHED = "unfinished"


# --- claiming a directory ------------------------------------------------------------------------------------------


@contextmanager
def claim(run_dir: Path, cfg: DictConfig, *, resumed: bool = False) -> Iterator[Status]:
    """Takes possession of a run directory for the run that ``cfg`` describes, or says why it cannot be had.

    A new one receives ``config.yaml``, its identity and its provenance. ``rerun=true`` moves an old one aside. Of
    several processes of one run only the first claims; the others look at what is there. A job of a sweep waits for a
    process that is at work on the same run already. Where the run fails, ``failure.json`` says why.

    Args:
        run_dir: the directory; made where it is missing.
        cfg: the run's configuration.
        resumed: Continue the run in it by explicit request, with another version of the code too.

    Yields:
        Whether there is nothing of this run yet, its result, or a beginning of it.

    Raises:
        UserError: it holds another run, files that are no run, or a run that another process is at work on.
    """
    if not is_first_process():
        started = (run_dir / "checkpoints").is_dir() and not cfg.rerun
        done = (run_dir / METRICS).exists() and not cfg.rerun
        yield Status.FINISHED if done else Status.UNFINISHED if started else Status.NEW
        return
    if cfg.rerun:
        _move_aside(run_dir)
    with _locked(run_dir, wait=sweep_dir() is not None):
        status = _status(run_dir, cfg, resumed)
        try:
            yield status
        except Exception as error:
            write_failure(run_dir, error_line(error), traceback.format_exc())
            raise


def finish(run_dir: Path, metrics: Mapping[str, float]) -> None:
    """Writes ``metrics.json``, whose presence says that the run is complete."""
    write_json(run_dir / METRICS, metrics)
    (run_dir / FAILURE).unlink(missing_ok=True)


def sweep_dir() -> Path | None:
    """Directory of the sweep that this process runs a job of."""
    directory = os.environ.get(SWEEP_VARIABLE)
    return Path(directory) if directory else None


def write_failure(run_dir: Path, error: str, trace: str = "") -> None:
    """Writes ``failure.json``: why the last attempt at a run failed, and how many have."""
    attempts = (read_json(run_dir / FAILURE) or {}).get("attempts", 0) + 1
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    write_json(run_dir / FAILURE, {"error": error, "traceback": trace, "at": at, "attempts": attempts})


def read_failure(run_dir: Path) -> dict[str, Any] | None:
    """What :func:`write_failure` wrote, or ``None``."""
    return read_json(run_dir / FAILURE)


def is_locked(run_dir: Path) -> bool:
    """Whether a process is at work in a run directory."""
    lock = FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # no such directory: the lock cannot be had, and nobody has it
        return run_dir.is_dir()
    lock.release()
    return False


def is_finished(run_dir: Path) -> bool:
    """Whether a run has written its result there."""
    return read_json(run_dir / METRICS) is not None


def is_first_process() -> bool:
    """Whether this is the process of a run that writes files, whoever launched the others."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") in ("", "0") for name in ranks)


def _status(run_dir: Path, cfg: DictConfig, resumed: bool) -> Status:
    ours = identity(cfg)
    theirs = read_json(run_dir / IDENTITY)
    if theirs is None:
        foreign = sorted(file.name for file in run_dir.iterdir() if not _IGNORED.fullmatch(file.name))
        if set(foreign) - {CONFIG, COMPOSED, PROVENANCE, FAILURE}:
            shown = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
            raise UserError(
                f"{run_dir} holds files that are no run of spo ({shown}): "
                "choose another hydra.run.dir, or move them away"
            )
        _write_config(run_dir, cfg)
        write_provenance(run_dir, cfg, ours)
        write_json(run_dir / IDENTITY, ours)  # last: from here on the directory is this run's
        return Status.NEW
    if resumed and theirs.get("code") != ours["code"]:
        # Another version may count other keys as part of a run, so only keys that both versions know are compared.
        shared = theirs.get("config", {}).keys() & ours["config"].keys()
        theirs, ours = (
            {**one, "config": {key: one["config"][key] for key in shared}, "code": None} for one in (theirs, ours)
        )
    if differing := differences(theirs, ours):
        raise UserError(
            "\n".join(
                [
                    f"{run_dir} holds another run. What differs:",
                    *(f"  - {line}" for line in differing),
                    "choose another hydra.run.dir, or add rerun=true to move the old one aside",
                ]
            )
        )
    return Status.FINISHED if is_finished(run_dir) else Status.UNFINISHED


@contextmanager
def _locked(run_dir: Path, wait: bool = False) -> Iterator[None]:
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK)
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


def _move_aside(run_dir: Path) -> None:
    if not run_dir.is_dir() or all(_IGNORED.fullmatch(file.name) for file in run_dir.iterdir()):
        return
    with _locked(run_dir):
        numbers = range(1, 10**6)
        aside = next(path for n in numbers if not (path := run_dir.with_name(f"{run_dir.name}.{n}")).exists())
        run_dir.rename(aside)


# --- identity ------------------------------------------------------------------------------------------------------


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What makes two runs the same: configuration, bytes of data and weights, code.

    Returns:
        ``config`` (flat keys, without paths, loggers, tags, Hydra's own and what the method does not read of alpha
        and beta), ``data``, ``weights``, ``adapter`` and ``judge`` (digests, ``None`` where there is no such file),
        ``code``, and the ``digest`` of it all.
    """
    left_out = {*NOT_IDENTITY, *unused_coefficients(cfg)}
    flat = {
        key: value
        for key, value in flatten(resolved(cfg)).items()
        if key.partition(".")[0] not in left_out and key not in NOT_IDENTITY_KEYS
    }
    # Where files lie is no part of what is computed, so the run's own folders appear by their names.
    folders = sorted(((str(path), f"<{name}>") for name, path in cfg.paths.items()), key=lambda pair: -len(pair[0]))
    flat = {key: _renamed(value, folders) for key, value in flat.items()}
    parts = {
        "config": flat,
        "data": _file_digest(OmegaConf.select(cfg, "data.path")),
        "weights": _folder_digest(OmegaConf.select(cfg, "model.path")),
        "adapter": _folder_digest(OmegaConf.select(cfg, "model.adapter_path")),
        "judge": _folder_digest(OmegaConf.select(cfg, "judge.path")),
        "code": code_version(),
    }
    return _with_digest(parts)


def _with_digest(parts: Mapping[str, Any]) -> dict[str, Any]:
    whole = json.dumps(parts, sort_keys=True, default=str)
    return {**json.loads(whole), "digest": hashlib.sha256(whole.encode()).hexdigest()}


def _renamed(value: Any, folders: Sequence[tuple[str, str]]) -> Any:
    if isinstance(value, str):
        for folder, name in folders:
            if value.startswith(f"{folder}/"):
                return name + value[len(folder) :]
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    before, after = old.get("config", {}), new.get("config", {})
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key, _NOTHING) != after.get(key, _NOTHING):
            lines.append(f"{key}: {_shown(before, key)} there, {_shown(after, key)} now")
    files = {
        "data": "bytes of the data",
        "weights": "weights of the model",
        "adapter": "weights of the adapter",
        "judge": "weights of the judge",
    }
    lines += [f"the {words} have changed" for name, words in files.items() if old.get(name) != new.get(name)]
    if old.get("code") != new.get("code"):
        lines.append(f"the code of spo: {old.get('code')} there, {new.get('code')} now")
    return lines


_NOTHING = object()


def _shown(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key]) if key in config else "absent"


@cache
def code_version(*parts: str) -> str:
    """Version of the package and digest of its code, such as ``0.1.0+1a2b3c4d5e6f``.

    Args:
        parts: files and folders of the package that count; none for all of it.
    """
    root = Path(spo.__file__).parent
    whole = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        if parts and not any(file.is_relative_to(root / part) for part in parts):
            continue
        whole.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{spo.__version__}+{whole.hexdigest()[:12]}"


def _file_digest(path: str | None) -> str | None:
    return None if path is None or not Path(path).expanduser().exists() else path_digest(path)


def _folder_digest(path: str | None) -> str | None:
    if path is None or not Path(path).is_dir():
        return None
    from spo.models.policy import folder_digest

    return folder_digest(path)


# --- configuration on disk -----------------------------------------------------------------------------------------


def resolved(cfg: DictConfig | ListConfig) -> Any:
    """The configuration as plain values, every interpolation resolved but those to secrets of the environment.

    Values of keys that hold a secret are left out; where they come from an environment variable, its name stays.
    """
    if isinstance(cfg, ListConfig):
        return [_value(cfg, index, "") for index in range(len(cfg))]
    return {str(name): _value(cfg, name, str(name)) for name in cfg}


def _value(node: Any, name: Any, key: str) -> Any:
    unresolved: Any = OmegaConf.to_container(node, resolve=False)
    raw = unresolved[name] if OmegaConf.is_interpolation(node, name) else None
    if isinstance(raw, str) and (_SECRET_VARIABLE.search(raw) or _SECRET_KEY.search(key)):
        return raw
    value = node[name]
    if isinstance(value, DictConfig | ListConfig):
        return resolved(value)
    return REDACTED if isinstance(value, str) and value and _SECRET_KEY.search(key) else value


def _write_config(run_dir: Path, cfg: DictConfig) -> None:
    """Writes what runs, as values, and beside it what they follow from: a later change reaches what depends on it."""
    _write_text(run_dir / CONFIG, OmegaConf.to_yaml(OmegaConf.create(resolved(cfg))))
    composed = _without_secrets(OmegaConf.to_container(cfg, resolve=False))
    composed.pop("hydra", None)
    composed["paths"]["run"] = str(Path(run_dir).absolute())
    _write_text(run_dir / COMPOSED, OmegaConf.to_yaml(OmegaConf.create(composed)))


def _without_secrets(node: Any, key: str = "") -> Any:
    if isinstance(node, dict):
        return {name: _without_secrets(value, str(name)) for name, value in node.items()}
    if isinstance(node, list):
        return [_without_secrets(value) for value in node]
    hidden = isinstance(node, str) and node and "${" not in node and _SECRET_KEY.search(key)
    return REDACTED if hidden else node


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, Mapping) or (not value and prefix):
        return {prefix.rstrip("."): value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= flatten(item, f"{prefix}{name}.")
    return flat


def load_config(run_dir: Path) -> DictConfig:
    """The configuration of the run in a directory, with the paths it has now.

    Raises:
        UserError: there is no run.
    """
    file = Path(run_dir) / COMPOSED
    if not file.is_file() or not (Path(run_dir) / IDENTITY).is_file():
        found = "it has no composed.yaml" if Path(run_dir).is_dir() else "there is no such folder"
        raise UserError(f"{run_dir} is no run directory of spo: {found}")
    register_resolvers()
    try:
        cfg = OmegaConf.load(file)
    except Exception as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    assert isinstance(cfg, DictConfig)
    cfg.paths.run = str(Path(run_dir).absolute())  # it may have been moved
    OmegaConf.set_struct(cfg, True)
    return cfg


# --- resuming ------------------------------------------------------------------------------------------------------


def resumed_config(run_dir: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration with which the run in ``run_dir`` goes on; what changes becomes part of its record.

    Only ``trainer.max_steps``, ``logger`` and ``strategy`` may change and, until the run is finished, ``judge`` and
    ``evaluation``: a judge that cannot be asked costs no training. A finished run goes on where ``max_steps`` grew.

    Raises:
        ConfigProblems: an override changes something else, or has no such key.
        UserError: there is no run, or it cannot be shortened.
    """
    run_dir = Path(run_dir)
    cfg = load_config(run_dir)
    before = int(cfg.trainer.max_steps)
    found: list[str] = []
    for text in sorted(overrides, key=lambda text: "." in text.partition("=")[0]):  # a group before its keys
        try:
            for single in expand_numbers([text]):
                _change(cfg, single, run_dir)
        except UserError as error:
            found.append(str(error))
    if found:
        raise ConfigProblems(found)
    if overrides and is_first_process():
        with _locked(run_dir):
            _record_changes(run_dir, cfg, before)
    return cfg


def _change(cfg: DictConfig, text: str, run_dir: Path) -> None:
    override = parse(text)
    key = override.key_or_group
    group = key.partition(".")[0]
    if group in UNTIL_FINISHED and is_finished(run_dir):
        raise UserError(f"{text}: the run is finished; spo evaluate {run_dir} {text} evaluates it anew")
    if key not in RESUMABLE and group not in (*RESUMABLE, *UNTIL_FINISHED):
        raise UserError(
            f"{text}: a resumed run keeps its settings; only trainer.max_steps, logger.* and strategy.* may change, "
            "and judge.* and evaluation.* until it is finished (start a new run to change anything else)"
        )
    if override.is_sweep_override() or override.is_delete():
        raise UserError(f"{text}: a resumed run takes one value per key")
    with open_dict(cfg) if override.is_add() or override.is_force_add() else _as_it_is():
        if key == group:
            fresh = compose([f"{key}={override.value()}"], run_dir=run_dir)[key]
            cfg[key] = OmegaConf.to_container(fresh, resolve=False)
            return
        try:
            OmegaConf.update(cfg, key, override.value(), merge=True)
        except OmegaConfBaseException:
            parent = key.rpartition(".")[0]
            node = OmegaConf.select(cfg, parent)
            has = f"; {parent} has {', '.join(map(str, node))}" if isinstance(node, DictConfig) else ""
            raise UserError(f"{text}: unknown key{has}") from None
    steps = cfg.trainer.max_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise UserError(f"{text}: must be a whole number of steps")


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _record_changes(run_dir: Path, cfg: DictConfig, before: int) -> None:
    old, finished = read_json(run_dir / IDENTITY) or {}, is_finished(run_dir)
    steps = int(cfg.trainer.max_steps)
    if finished and steps < before:
        raise UserError(f"trainer.max_steps={steps}: the run in {run_dir} is finished at {before} steps")
    if finished and steps > before:
        (run_dir / METRICS).rename(run_dir / f"metrics.{before}.json")
    new = identity(cfg)
    _write_config(run_dir, cfg)
    # The code stays the one that started the run: the same command refuses another version, and provenance.json lists
    # the versions that continued it.
    parts = {**old, "config": new["config"], "judge": new["judge"]}
    parts.pop("digest", None)
    write_json(run_dir / IDENTITY, _with_digest(parts))


# --- provenance ----------------------------------------------------------------------------------------------------


def write_provenance(run_dir: Path, cfg: DictConfig, parts: Mapping[str, Any]) -> None:
    """Writes ``provenance.json``: code, versions, digests, seeds and the command.

    Args:
        run_dir: the run directory.
        cfg: the run's configuration.
        parts: its :func:`identity`.
    """
    package = Path(spo.__file__)
    git = git_state(package.parent, package.name) or git_state(Path.cwd()) or {"git_sha": None, "git_dirty": None}
    provenance = {
        **git,
        "code": parts["code"],
        "command": command_line(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "seeds": {"seed": cfg.seed, "data.seed": OmegaConf.select(cfg, "data.seed")},
        "data": {"path": OmegaConf.select(cfg, "data.path"), "sha256": parts["data"]},
        "weights": {"path": OmegaConf.select(cfg, "model.path"), "sha256": parts["weights"]},
        "adapter": {"path": OmegaConf.select(cfg, "model.adapter_path"), "sha256": parts["adapter"]},
        "identity": parts["digest"],
    }
    write_json(run_dir / PROVENANCE, provenance)


def record_continuation(run_dir: Path, step: int) -> None:
    """Record in ``provenance.json`` that another version of the code continues a run, and print it.

    The list ``continued_with`` receives the version, the time, the step and the command. The version that the run
    already has adds nothing.

    Args:
        run_dir: Run directory.
        step: Optimizer step of the checkpoint that the run continues from, 0 where it starts again.
    """
    if not is_first_process():
        return
    provenance = read_json(run_dir / PROVENANCE) or {}
    started = (read_json(run_dir / IDENTITY) or {}).get("code")
    continued = provenance.get("continued_with", [])
    code = code_version()
    if code == (continued[-1]["code"] if continued else started):
        return
    print(f"note: code {started} started this run; it continues at step {step} with code {code}", file=sys.stderr)
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    entry = {"code": code, "at": at, "step": step, "command": command_line(sys.argv)}
    write_json(run_dir / PROVENANCE, {**provenance, "continued_with": [*continued, entry]})


def git_state(folder: Path, tracked: str = ".") -> dict[str, Any] | None:
    """Commit of the repository around ``folder``, and whether its files differ from it.

    Args:
        folder: where to look.
        tracked: a file in it that has to belong to the repository: an installed package may lie in one by chance.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    sha = git("rev-parse", "HEAD")
    if sha is None or (tracked != "." and git("ls-files", "--error-unmatch", tracked) is None):
        return None
    changes = git("status", "--porcelain")
    return {"git_sha": sha, "git_dirty": None if changes is None else bool(changes)}


def command_line(argv: Sequence[str]) -> str:
    """The command as it was typed, without secrets."""
    words = [Path(argv[0]).name if argv else "", *argv[1:]]
    if words[0] == "__main__.py":
        words[0] = "python -m spo"
    return " ".join(_without_secret(word) for word in words)


def _without_secret(word: str) -> str:
    key, equals, _ = word.partition("=")
    return f"{key}={REDACTED}" if equals and _SECRET_KEY.search(key) else word


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- files ---------------------------------------------------------------------------------------------------------


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file so that it is either there in whole or not at all."""
    _write_text(file, json.dumps(value, indent=2, default=str) + "\n")


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def read_json(file: Path) -> Any:
    """What a JSON file holds; ``None`` where it is missing or cut."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
