"""Composing a configuration: plain numbers for alpha and beta, and the resolvers that the yaml files use."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, RangeSweep, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from spo import slurm
from spo.config.best_setting import best_setting
from spo.config.choices import pin_choices
from spo.config.coefficients import COEFFICIENTS, unused_coefficients
from spo.config.groups import shipped_names
from spo.config.nodes import EXTRA_REFERENCES, FURTHER_KL, select
from spo.errors import UserError
from spo.processes import place
from spo.records.operational_keys import OPERATIONAL_KEYS
from spo.records.parameters import count_parameters
from spo.resources import MAIN_CONFIG, conf_dir
from spo.schedules.optimization import learning_rate
from spo.secrets import remember_secrets, without_secrets

VERSION_BASE = "1.3"


# --- composing -----------------------------------------------------------------------------------------------------


def compose(
    overrides: Sequence[str] = (), config_dir: str | Path | None = None, run_dir: str | Path | None = None
) -> DictConfig:
    """Compose the configuration that ``spo train OVERRIDES`` would run, for notebooks and tests.

    Args:
        overrides: Overrides as on the command line, plain numbers for alpha and beta included.
        config_dir: Folder with further members of the groups, as ``--config-dir``.
        run_dir: Value of ``paths.run``; ``None`` for the directory that ``hydra.run.dir`` names.

    Raises:
        UserError: An override cannot be used.
    """
    with composer(config_dir) as composed:
        cfg = composed(expand_numbers(overrides))
    directory = Path(run_dir if run_dir is not None else cfg.hydra.run.dir).absolute()
    pin_choices(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    fill_empty_groups(cfg)
    cfg.paths.run = str(directory)
    return cfg


@contextmanager
def composer(config_dir: str | Path | None = None) -> Iterator[Any]:
    """Open Hydra, and yield a function from overrides to a configuration that includes Hydra's own node.

    It may be opened while Hydra runs: the state of that run is restored at the end.

    Args:
        config_dir: Folder with further members of the groups.

    Raises:
        UserError: ``config_dir`` is not a folder, or has a member with the name of a shipped one.
    """
    register_resolvers()
    extra: list[str] = []
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not folder.is_dir():
            raise UserError(f"--config-dir {config_dir}: there is no such folder")
        if taken := shipped_names(folder):
            raise UserError(
                f"--config-dir {config_dir}: {taken[0]}.yaml has the name of a shipped member, which a run would "
                "use instead: give it another name"
            )
        quoted = str(folder).replace("'", r"\'")
        extra.append(f"hydra.searchpath=['file://{quoted}']")
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), job_name="spo", version_base=VERSION_BASE):

            def composed(overrides: Sequence[str]) -> DictConfig:
                own = any(override.lstrip("+").startswith("hydra.searchpath") for override in overrides)
                cfg = hydra.compose(MAIN_CONFIG, [*([] if own else extra), *overrides], return_hydra_config=True)
                remember_secrets(OmegaConf.to_container(cfg, resolve=False))
                return pin(cfg)

            yield composed
    finally:
        GlobalHydra.instance().hydra = running


PINNED = ("model.num_parameters", "model.default_lr")
"""Keys that follow from files. A configuration holds their values, so they stay when the files are moved."""


def pin(cfg: DictConfig) -> DictConfig:
    """Replace the interpolations of keys that follow from files by their values, and return the configuration.

    Args:
        cfg: Composed configuration, with or without Hydra's own node.
    """
    for key in PINNED:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent)
        if isinstance(node, DictConfig) and name in node and OmegaConf.is_interpolation(node, name):
            with suppress(OmegaConfBaseException):  # The checks report what it refers to, such as a missing path.
                node[name] = node[name]
    return cfg


def pinned_overrides(cfg: DictConfig) -> list[str]:
    """Return overrides with the values of the keys that :func:`pin` replaced, for a composition by Hydra alone."""
    values = {key: select(cfg, key) for key in PINNED}
    return [] if select(cfg, PINNED[0]) is None else [f"{key}={value}" for key, value in values.items()]


def parser() -> OverridesParser:
    """Return Hydra's parser of overrides; it can expand ``glob(...)`` while a :func:`composer` is open."""
    hydra_is_up = GlobalHydra.instance().is_initialized()
    return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader() if hydra_is_up else None)


def parse(override: str) -> Override:
    """Read one override.

    Args:
        override: Text such as ``KEY=VALUE``.

    Raises:
        UserError: The text is not an override.
    """
    try:
        return parser().parse_overrides([override])[0]
    except HydraException as error:
        words = str(error).split("\nSee https")[0]
        hint = "an override is KEY=VALUE" if "=" not in override else words.splitlines()[-1].split(" expecting ")[0]
        raise UserError(f"{override}: cannot be read ({hint})") from error


# --- empty groups --------------------------------------------------------------------------------------------------

NULL_MEMBERS = {
    "logger": "record",
    "callbacks": "none",
    "judge": "none",
    "regularizer": "none",
    "reference": "none",
    "experiment": None,
    "hparams_search": None,
    "iteration": None,
}
"""Member that ``GROUP=null`` stands for; ``None`` where no member is chosen."""
EMPTY_GROUPS = ("logger", "callbacks")
"""Groups that are mappings of objects, of which there may be none."""


def fill_empty_groups(cfg: DictConfig) -> None:
    """Replace ``logger: null`` and ``callbacks: null`` of an experiment file by empty mappings, in place."""
    with open_dict(cfg):
        for group in EMPTY_GROUPS:
            if cfg.get(group) is None:
                cfg[group] = {}


# --- plain numbers -------------------------------------------------------------------------------------------------


def expand_numbers(overrides: Sequence[str]) -> list[str]:
    """Write out plain numbers for alpha and beta: ``alpha=0.5`` becomes ``alpha=constant alpha.value=0.5``.

    This applies if the key is exactly ``alpha`` or ``beta`` and every value is a positive number: one number, several
    of a multirun, a ``choice``, a ``range`` or an ``interval``. Names of schedules stay as they are. A group that may
    be empty accepts ``null`` for the member that leaves it empty. ``extra_references`` and ``evaluation.further_kl``
    take new keys without a plus.

    Args:
        overrides: Overrides as typed.

    Raises:
        UserError: A value is neither a positive number nor a name, or the two are mixed.
    """
    result: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and value.strip() == "null" and key.strip() in NULL_MEMBERS:
            member = NULL_MEMBERS[key.strip()]
            result += [] if member is None else [f"{key.strip()}={member}"]
        elif equals and key.strip() in COEFFICIENTS and _is_number(parse(override)):
            result += [f"{key.strip()}=constant", f"{key.strip()}.value={value}"]
        elif equals and key.strip().startswith((f"{EXTRA_REFERENCES}.", f"{FURTHER_KL}.")):
            result.append(f"++{override.strip()}")
        else:
            result.append(override)
    return result


def _is_number(override: Override) -> bool:
    """Return whether every value is a positive number; :class:`UserError` for anything but names otherwise."""
    if override.type is not OverrideType.CHANGE or override.package is not None:
        return False
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return False
    values = _values(override)
    if all(isinstance(value, str) and value for value in values):
        return False
    example = f"{override.key_or_group}=0.1, or the name of a schedule such as {override.key_or_group}=linear"
    for value in values:
        if isinstance(value, str) and value:
            raise UserError(f"{override.input_line}: names and numbers are mixed; give numbers alone or names alone")
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            raise UserError(f"{override.input_line}: {json.dumps(value, default=str)} is not a number; write {example}")
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{override.input_line}: {value} is not a positive, finite number; write {example}")
    return True


def _values(override: Override) -> list[Any]:
    """Return every value that an override stands for, or the ends of an interval."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    if isinstance(value, RangeSweep):
        if not value.step:
            raise UserError(f"{override.input_line}: a range needs a step other than 0")
        values = list(value.range())
        if not values:
            raise UserError(f"{override.input_line}: this range is empty")
        return values
    if override.value_type is ValueType.ELEMENT:
        return [value]
    return [Override._convert_value(item) for item in override.sweep_iterator()]


# --- resolvers -----------------------------------------------------------------------------------------------------


def register_resolvers() -> None:
    """Register the functions that the yaml files call as ``${spo.NAME:...}``."""
    OmegaConf.register_new_resolver("spo.multiply", multiply, replace=True)
    OmegaConf.register_new_resolver("spo.add", add, replace=True)
    OmegaConf.register_new_resolver("spo.at_most", min, replace=True)
    OmegaConf.register_new_resolver("spo.unless", unless, replace=True)
    OmegaConf.register_new_resolver("spo.num_parameters", num_parameters, replace=True)
    OmegaConf.register_new_resolver("spo.learning_rate", default_learning_rate, replace=True)
    OmegaConf.register_new_resolver("spo.processes", processes, replace=True)
    OmegaConf.register_new_resolver("spo.run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("spo.tasks_per_node", tasks_per_node, replace=True)
    OmegaConf.register_new_resolver("spo.gpus_per_node", gpus_per_node, replace=True)
    OmegaConf.register_new_resolver("spo.best_setting", best_setting, replace=True)
    OmegaConf.register_new_resolver("spo.job_name", _directory, replace=True)
    OmegaConf.register_new_resolver("spo.sweep_name", job_name, replace=True)


def multiply(a: float, b: float) -> float:
    """Return ``a * b`` as a person would write it: 0.05 times 0.1 is 0.005."""
    return float(Decimal(str(a)) * Decimal(str(b)))


def add(*numbers: int) -> int:
    """Return the sum."""
    return sum(numbers)


def unless(given: Any, default: Any) -> Any:
    """Return ``default`` where ``given`` is null, and null otherwise: the default of a key that another replaces."""
    return default if given is None else None


def num_parameters(path: str | None) -> int | None:
    """Return the number of parameters of a model, ``None`` where it cannot be counted.

    Args:
        path: Value of ``model.path``.
    """
    return None if path is None else count_parameters(str(path))


def default_learning_rate(num_parameters: int | None, lora: Any) -> float | None:
    """Return the learning rate for a model of this size, ``None`` where the size is unknown.

    Args:
        num_parameters: Value of ``model.num_parameters``.
        lora: Value of ``model.lora``, ``None`` for full fine-tuning.
    """
    return None if num_parameters is None else learning_rate(num_parameters, lora=lora is not None)


def processes(devices: int | str, nodes: int) -> int:
    """Return the number of processes of a run. Configurations of runs of version 0.1.0 with ``strategy=fsdp`` need it.

    In a process of several, that is their number.

    Args:
        devices: Value of ``trainer.devices``.
        nodes: Value of ``trainer.num_nodes``.

    Raises:
        ValueError: ``devices`` is not a number.
    """
    if (started := place().world_size) > 1:
        return started
    if not str(devices).isdigit():
        raise ValueError(f"this strategy needs the number of devices: set trainer.devices, which is {devices}")
    return int(devices) * int(nodes)


def run_name(now: str, overrides: Sequence[str]) -> str:
    """Return the name of a run's directory: the time, or the id of the SLURM job that runs the command.

    SLURM may queue a job again, and the same command then has to find its run.

    Args:
        now: Time as text.
        overrides: Overrides of the command, which distinguish the commands of one job.
    """
    job = slurm.job_id()
    if job is None:
        return now
    return f"slurm-{job}-{hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:8]}"


def tasks_per_node(devices: Any) -> int:
    """Return how many processes a cluster starts on each node: one per device, or one if their number is unknown."""
    if str(devices).isdigit():
        return int(devices)
    return 1 if str(devices) in ("auto", "-1") else len(str(devices).strip("[],").split(","))


def gpus_per_node(devices: Any, accelerator: str) -> int | None:
    """Return the number of GPUs to ask a cluster for, per node; ``None`` for a run on the CPU."""
    return None if accelerator == "cpu" else tasks_per_node(devices)


MAX_NAME_LENGTH = 120
# A name leaves out groups that change no result, except for two: a sweep over them needs a directory for each value.
_UNNAMED_GROUPS = {key for key in OPERATIONAL_KEYS if "." not in key} - {"speed", "strategy"}
_UNNAMED_KEYS = {"iteration.rounds"}  # An iteration keeps its directory when it gets more rounds.
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9._]*")
_VALUE = re.compile(r"[A-Za-z0-9._-]+")
_NUMBER = re.compile(r"[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)


def _directory(overrides: Sequence[str], *, _root_: DictConfig) -> str:
    return directory(overrides, _root_)


def directory(overrides: Sequence[str], cfg: DictConfig) -> str:
    """Return the name of a job's directory in its sweep.

    Coefficients that the job does not read and the search that proposed it are not part of the name.

    Args:
        overrides: Overrides of the job.
        cfg: Configuration of the job.
    """
    return job_name(overrides, [*unused_coefficients(cfg), "hparams_search"])


def job_name(overrides: Sequence[str], dropped: Sequence[str] = ()) -> str:
    """Return a name for a list of overrides, such as ``method-spo_alpha-0.5_seed-1``.

    A name has at most 120 characters of ``[A-Za-z0-9._-]``, and different lists have different names. ``_`` in a value
    is written ``__``, so that the overrides can be read from the name. If they do not fit (a path, whose last part
    is shown, or other characters), eight hex digits of the list's digest end the name. A name that is cut keeps
    its seed.

    Args:
        overrides: Overrides of a job.
        dropped: Further groups to omit, such as coefficients that the job does not read.
    """
    typed: Any = OmegaConf.to_container(overrides, resolve=False) if isinstance(overrides, ListConfig) else overrides
    named = [
        text
        for text in without_secrets(list(map(str, typed)))
        if _group(text) not in _UNNAMED_GROUPS.union(dropped) and text.partition("=")[0] not in _UNNAMED_KEYS
    ]
    if not named:
        return "default"
    parts, lossless = [], True
    for key, value in _merged(named):
        exact = _KEY.fullmatch(key) is not None and _VALUE.fullmatch(value) is not None
        lossless &= exact
        if exact:
            parts.append(f"{key}-{value.replace('_', '__')}")
        else:
            shown = f"{key.lstrip('+~')}-{Path(value.rstrip('/')).name}"
            parts.append(re.sub(r"[^A-Za-z0-9._-]+", "-", shown).strip("-_."))
    name = "_".join(part for part in parts if part)
    if lossless and len(name) <= MAX_NAME_LENGTH:
        return name
    digits = hashlib.sha256("\0".join(named).encode()).hexdigest()[:8]
    seed = next((f"_{part}" for part in parts if part.startswith("seed-")), "")
    kept = name[: MAX_NAME_LENGTH - 9]
    if len(name) > len(kept) and f"{seed}_" not in f"{kept}_":
        kept = f"{name[: MAX_NAME_LENGTH - 9 - len(seed)].rstrip('-_.')}{seed}"
    return f"{kept.rstrip('-_.') or 'job'}_{digits}"


def _group(override: str) -> str:
    """Return the group of an override, such as ``alpha`` of ``+alpha.value=1`` or ``hydra`` of ``hydra/launcher=x``."""
    return re.split(r"[./=@]", override.lstrip("+~"), maxsplit=1)[0]


def _merged(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield keys and values; the two overrides that stand for a plain number become one."""
    pairs = [(key, value) for key, _, value in (override.partition("=") for override in overrides)]
    skip = False
    for (key, value), (next_key, next_value) in zip(pairs, [*pairs[1:], ("", "")], strict=True):
        if skip:
            skip = False
            continue
        is_pair = key in COEFFICIENTS and (value, next_key) == ("constant", f"{key}.value")
        if is_pair and _NUMBER.fullmatch(next_value):
            skip = True
            yield key, next_value
        else:
            yield key, value
