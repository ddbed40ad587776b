"""Walk a configuration, and find the object that a ``_target_`` names."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spo.errors import missing_package
from spo.resources import conf_dir
from spo.wording import suggestion

ROUND_SOURCE = "iteration.source"
"""Key of the source of a round's pairs, which reads :data:`DATA_SOURCE` for prompts; absent outside an iteration."""
DATA_SOURCE = "data.source"
EXTRA_REFERENCES = "extra_references"
"""Key with the models of the references that a method declares beside the main one, by name."""
DEFAULT_REFERENCES = "method.default_references"
"""Key with the models of a method's references for which the user gives nothing."""
INITIAL = "initial"
"""Model of a further reference that is the policy's before supervised fine-tuning, in place of a path."""
FURTHER_KL = "evaluation.further_kl"
"""Key with the models to which an evaluation measures the KL besides the reference, by name."""
PROMPT_SETS = ("train", "selection", "unlabeled")
"""Values of ``regularizer.prompts`` that do not name a file."""
DIRECTIVES = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def locate(path: str) -> Any:
    """Return the object that a ``_target_`` names.

    Args:
        path: Dotted path.

    Raises:
        ImportError: There is no such object; the message is for people.
    """
    parts = path.split(".")
    for size in range(len(parts), 0, -1):
        module = ".".join(parts[:size])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
                continue
            raise ImportError(missing_package(str(error.name)) or f"importing {module} failed: {error}") from error
        for name in parts[size:]:
            if not hasattr(found, name):
                raise ImportError(f"there is no {path}{suggestion(name, [n for n in dir(found) if n[0] != '_'])}")
            found = getattr(found, name)
        return found
    # Commands that read directories of somebody else do not import from the current folder.
    here = "is the folder that holds it the current one, or on PYTHONPATH?"
    hint = here if os.getcwd() in sys.path else "put the folder that holds it on PYTHONPATH"
    raise ImportError(missing_package(path) or f"there is no module {parts[0]} to take {path} from; {hint}")


def entries(cfg: DictConfig | ListConfig, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield every key, the node that holds it and its name there; references to other keys are not followed."""
    names: Iterable[Any] = list(cfg) if isinstance(cfg, DictConfig) else range(len(cfg))
    for name in names:
        key = f"{prefix}{name}"
        if key == "hydra":
            continue
        yield key, cfg, name
        if OmegaConf.is_missing(cfg, name) or OmegaConf.is_interpolation(cfg, name):
            continue
        value = cfg[name]
        if isinstance(value, DictConfig | ListConfig):
            yield from entries(value, f"{key}.")


def keys_of(cfg: DictConfig) -> set[str]:
    """Return the dotted keys of a configuration, without items of lists."""
    return {key for key, node, _ in entries(cfg) if isinstance(node, DictConfig)}


def nodes_with_target(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Yield the key and the node of every ``_target_``."""
    for key, node, name in entries(cfg):
        if name == "_target_" and not OmegaConf.is_missing(node, name):
            yield key.rpartition(".")[0], node


def targets(cfg: DictConfig | None) -> dict[str, str]:
    """Return the ``_target_`` of every node, by the key of the node; nothing for ``None``."""
    return {} if cfg is None else {key: str(node["_target_"]) for key, node in nodes_with_target(cfg)}


def in_target(cfg: DictConfig, key: str) -> bool:
    """Return whether a key lies below a node with a ``_target_``, whose signature decides about it."""
    parents = list(itertools.accumulate(key.split(".")[:-1], lambda a, b: f"{a}.{b}"))
    return any(select(cfg, f"{parent}._target_") is not None for parent in parents)


def select(cfg: DictConfig, key: str, default: Any = None) -> Any:
    """Return the value of a dotted key; ``default`` if it is absent, missing or cannot be resolved."""
    try:
        return OmegaConf.select(cfg, key, default=default, throw_on_missing=False)
    except OmegaConfBaseException:
        return default


def has_judge(cfg: DictConfig) -> bool:
    """Return whether a configuration has a judge, without making it: ``judge=gold`` takes data with a reward."""
    target = select(cfg, "judge._target_")
    if target is None:
        return False
    return not str(target).endswith(".reward_judge") or select(cfg, "judge.reward") is not None


def source_key(cfg: DictConfig) -> str:
    """Return the key of the source of a run's rows: that of a round where there is one, else that of the data."""
    return DATA_SOURCE if select(cfg, ROUND_SOURCE) is None else ROUND_SOURCE


def extra_references(cfg: DictConfig) -> dict[str, Any]:
    """Return the model of each further reference, by name: a path or :data:`INITIAL`.

    A name for which the user gives nothing has the default of the method. A value that is missing or cannot be
    resolved is ``None``. A run of an earlier version may not have the keys.
    """
    return {name: select(cfg, key) for name, key in extra_reference_keys(cfg).items()}


def further_kl_models(cfg: DictConfig) -> dict[str, Any]:
    """Return the folder or hub name of each model below :data:`FURTHER_KL`, by name; an older run has none."""
    given = select(cfg, FURTHER_KL)
    return {str(name): select(given, str(name)) for name in given} if isinstance(given, DictConfig) else {}


def extra_reference_keys(cfg: DictConfig) -> dict[str, str]:
    """Return the key that gives each further reference its model, by name."""
    groups = [(key, select(cfg, key)) for key in (DEFAULT_REFERENCES, EXTRA_REFERENCES)]
    return {name: f"{key}.{name}" for key, given in groups if isinstance(given, DictConfig) for name in map(str, given)}


def detached(node: DictConfig) -> DictConfig:
    """Return a resolved copy of a node, to make objects of.

    Hydra's ``instantiate`` resolves the nodes to which interpolations lead in place, such as ``data.source`` for the
    source of a round. A configuration would then hold their values, and no longer follow what they refer to.

    Args:
        node: Node of a configuration.

    Raises:
        OmegaConfBaseException: An interpolation cannot be resolved.
    """
    copied = OmegaConf.create(OmegaConf.to_container(node, resolve=True))
    assert isinstance(copied, DictConfig)
    return copied


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(words: Iterable[str]) -> str:
    """Return the words as ``a, b or c``."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def member_name(group: str, cls: type, part: str = "") -> str:
    """Return the shipped member of a group that makes ``cls``, or the name of the class; for messages.

    Args:
        group: Group of the configuration.
        cls: Class.
        part: Key below the group whose ``_target_`` makes the class; empty for the group itself.
    """
    for file in sorted((conf_dir() / group).glob("*.yaml")):
        target = OmegaConf.select(OmegaConf.load(file), f"{part}._target_" if part else "_target_")
        if target is not None and str(target).rpartition(".")[2] == cls.__name__:
            return file.stem
    return cls.__name__
