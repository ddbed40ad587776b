"""The configuration in a run directory: ``config.yaml`` has its values, ``composed.yaml`` its interpolations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from spo.config.compose import register_resolvers
from spo.config.nodes import first_line
from spo.errors import UserError
from spo.records import filenames
from spo.records.files import flatten, load_yaml, read_mapping, write_text
from spo.records.iteration import with_own_rounds
from spo.secrets import REDACTED, is_secret_key, reads_secret_variable, redact, remember_secrets, scrubbed


def resolved(cfg: DictConfig | ListConfig, key: str = "") -> Any:
    """Return the configuration as plain values without secrets.

    Every interpolation is resolved, except those that read a secret from the environment. Other values of keys that
    name a secret are replaced by ``<redacted>``, and so is every copy of a secret in another value.

    Args:
        cfg: Configuration, its interpolations unresolved.
        key: Dotted key of ``cfg`` in a larger configuration.
    """
    if isinstance(cfg, ListConfig):
        return [_value(cfg, index, key) for index in range(len(cfg))]
    prefix = f"{key}." if key else ""
    return {str(name): _value(cfg, name, f"{prefix}{name!s}") for name in cfg}


def _value(node: Any, name: Any, key: str) -> Any:
    unresolved: Any = OmegaConf.to_container(node, resolve=False)
    raw = unresolved[name] if OmegaConf.is_interpolation(node, name) else None
    if isinstance(raw, str) and (reads_secret_variable(raw) or is_secret_key(key)):
        return raw
    value = node[name]
    if isinstance(value, DictConfig | ListConfig):
        return resolved(value, key)
    return REDACTED if isinstance(value, str) and value and is_secret_key(key) else scrubbed(value)


def write_config(run_dir: Path, cfg: DictConfig) -> None:
    """Write both files of the configuration.

    The interpolations are stored too: when a resumed run changes a key, the keys that follow from it change as well.
    """
    write_text(run_dir / filenames.CONFIG, OmegaConf.to_yaml(OmegaConf.create(resolved(cfg))))
    composed = scrubbed(redact(OmegaConf.to_container(cfg, resolve=False)))
    composed.pop("hydra", None)
    composed["paths"]["run"] = str(Path(run_dir).absolute())
    write_text(run_dir / filenames.COMPOSED, OmegaConf.to_yaml(OmegaConf.create(composed)))


def is_readable_config(file: Path) -> bool:
    """Return whether a file holds the YAML of a configuration."""
    try:
        return isinstance(load_yaml(file.read_text(encoding="utf-8")), dict)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError):
        return False


def load_config(run_dir: Path) -> DictConfig:
    """Return the configuration of the run in a directory, with the path that the directory has now.

    A round of an iteration that was moved names the policies and samples of the other rounds where they are now.

    Raises:
        UserError: The directory does not hold a run, or its configuration is damaged.
    """
    run_dir = Path(run_dir)
    file = run_dir / filenames.COMPOSED
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a run directory of spo: there is no such folder")
    if absent := [name for name in (filenames.COMPOSED, filenames.IDENTITY) if not (run_dir / name).exists()]:
        raise UserError(f"{run_dir} is not a run directory of spo: {absent[0]} is missing")
    register_resolvers()
    try:
        cfg = OmegaConf.load(file)
    except OSError as error:
        raise _damaged(file, error.strerror or str(error)) from error
    except Exception as error:
        raise _damaged(file, first_line(error)) from error
    if not isinstance(cfg, DictConfig):
        raise _damaged(file, "it holds a list and not the keys of a configuration")
    recorded = (read_mapping(run_dir / filenames.IDENTITY) or {}).get("config")
    expected = {"paths", *(str(key).partition(".")[0] for key in (recorded if isinstance(recorded, dict) else {}))}
    if absent := sorted(key for key in expected if key not in cfg):
        raise _damaged(file, f"it does not have the key {absent[0]}")
    if not isinstance(cfg._get_node("paths"), DictConfig):
        raise _damaged(file, "its key paths does not hold further keys")
    values = OmegaConf.to_container(cfg, resolve=False)
    remember_secrets(values)
    # The directory may have been moved.
    placed = OmegaConf.create(with_own_rounds(values, run_dir))
    placed.pop("hydra", None)
    placed.paths.run = str(run_dir.absolute())
    OmegaConf.set_struct(placed, True)
    assert isinstance(placed, DictConfig)
    return placed


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file} is damaged ({reason}): start the run again with its own command, which writes the file anew; "
        f"{filenames.PROVENANCE} has the command"
    )


def refuse_redacted(cfg: DictConfig) -> None:
    """Refuse a configuration that needs a secret which the record does not hold.

    Args:
        cfg: Configuration of a run directory with the caller's overrides.

    Raises:
        UserError: A value is ``<redacted>``.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=False)
    if missing := [key for key, value in flatten(values).items() if isinstance(value, str) and REDACTED in value]:
        raise UserError(
            f"{', '.join(missing)}: the run directory does not hold this secret; give it again as {missing[0]}=VALUE, "
            "or as ${oc.env:NAME} with the secret in that environment variable"
        )
