"""Composing a configuration: plain numbers for alpha and beta, and the resolvers that the yaml files use."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, RangeSweep, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from spo.config.coefficients import COEFFICIENTS, unused_coefficients
from spo.errors import UserError
from spo.resources import MAIN, conf_dir

VERSION_BASE = "1.3"


# --- composing -----------------------------------------------------------------------------------------------------


def compose(
    overrides: Sequence[str] = (), config_dir: str | Path | None = None, run_dir: str | Path | None = None
) -> DictConfig:
    """The configuration that ``spo train OVERRIDES`` would run, for notebooks and tests.

    Args:
        overrides: as on the command line, plain numbers for alpha and beta included.
        config_dir: folder with further members of the groups, as ``--config-dir``.
        run_dir: becomes ``paths.run``; ``None`` for the one ``hydra.run.dir`` names.

    Raises:
        UserError: an override cannot be used.
    """
    with composer(config_dir) as composed:
        cfg = composed(expand_numbers(overrides))
    directory = Path(run_dir if run_dir is not None else cfg.hydra.run.dir).absolute()
    with open_dict(cfg):
        del cfg["hydra"]
    cfg.paths.run = str(directory)
    return cfg


@contextmanager
def composer(config_dir: str | Path | None = None) -> Iterator[Any]:
    """A function from overrides to a configuration that includes Hydra's own node.

    It may be opened while Hydra runs: what Hydra had in use is put back.

    Raises:
        UserError: ``config_dir`` is no folder.
    """
    register_resolvers()
    extra: list[str] = []
    if config_dir is not None:
        folder = Path(config_dir).absolute()
        if not folder.is_dir():
            raise UserError(f"--config-dir {config_dir}: there is no such folder")
        quoted = str(folder).replace("'", r"\'")
        extra.append(f"hydra.searchpath=['file://{quoted}']")
    with hydra.initialize_config_dir(str(conf_dir()), job_name="spo", version_base=VERSION_BASE):

        def composed(overrides: Sequence[str]) -> DictConfig:
            own = any(override.lstrip("+").startswith("hydra.searchpath") for override in overrides)
            return hydra.compose(MAIN, [*([] if own else extra), *overrides], return_hydra_config=True)

        yield composed


def parser() -> OverridesParser:
    """Hydra's parser of overrides, able to expand ``glob(...)`` where a :func:`composer` is open."""
    hydra_is_up = GlobalHydra.instance().is_initialized()
    return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader() if hydra_is_up else None)


def parse(override: str) -> Override:
    """Reads one override.

    Raises:
        UserError: it is none.
    """
    try:
        return parser().parse_overrides([override])[0]
    except HydraException as error:
        words = str(error).split("\nSee https")[0]
        hint = "an override is KEY=VALUE" if "=" not in override else words.splitlines()[-1].split(" expecting ")[0]
        raise UserError(f"{override}: cannot be read ({hint})") from error


# --- plain numbers -------------------------------------------------------------------------------------------------


def expand_numbers(overrides: Sequence[str]) -> list[str]:
    """Plain numbers for alpha and beta, as a person types them: ``alpha=0.5`` is ``alpha=constant alpha.value=0.5``.

    It applies where the key is exactly ``alpha`` or ``beta`` and every value is a positive number: one number, several
    of a multirun, a ``choice``, a ``range`` or an ``interval``. Names of schedules are left alone.

    Raises:
        UserError: the value is neither a positive number nor a name, or the two are mixed.
    """
    result: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key.strip() in COEFFICIENTS and _is_number(parse(override)):
            result += [f"{key.strip()}=constant", f"{key.strip()}.value={value}"]
        else:
            result.append(override)
    return result


def _is_number(override: Override) -> bool:
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
            raise UserError(f"{override.input_line}: {json.dumps(value, default=str)} is no number; write {example}")
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{override.input_line}: {value} is no positive, finite number; write {example}")
    return True


def _values(override: Override) -> list[Any]:
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
    """Makes the functions that the yaml files use as ``${spo.NAME:...}`` known."""
    OmegaConf.register_new_resolver("spo.multiply", multiply, replace=True)
    OmegaConf.register_new_resolver("spo.add", add, replace=True)
    OmegaConf.register_new_resolver("spo.at_most", min, replace=True)
    OmegaConf.register_new_resolver("spo.processes", processes, replace=True)
    OmegaConf.register_new_resolver("spo.tasks_per_node", tasks_per_node, replace=True)
    OmegaConf.register_new_resolver("spo.gpus_per_node", gpus_per_node, replace=True)
    OmegaConf.register_new_resolver("spo.job_name", _directory, replace=True)
    OmegaConf.register_new_resolver("spo.sweep_name", job_name, replace=True)


def multiply(a: float, b: float) -> float:
    """``a * b`` as a person would write it: 0.05 times 0.1 is 0.005."""
    return float(Decimal(str(a)) * Decimal(str(b)))


def add(*numbers: int) -> int:
    """The sum."""
    return sum(numbers)


def processes(devices: int | str, nodes: int) -> int:
    """Processes of a run, for strategies that must be told.

    Raises:
        ValueError: devices is no number.
    """
    if not str(devices).isdigit():
        raise ValueError(f"this strategy must know the number of devices: set trainer.devices, which is {devices}")
    return int(devices) * int(nodes)


def tasks_per_node(devices: Any) -> int:
    """Processes that a cluster is to start on each node: one for each device, one where their number is not told."""
    if str(devices).isdigit():
        return int(devices)
    return 1 if str(devices) in ("auto", "-1") else len(str(devices).strip("[],").split(","))


def gpus_per_node(devices: Any, accelerator: str) -> int | None:
    """GPUs to ask a cluster for; ``None`` for a run on the CPU."""
    return None if accelerator == "cpu" else tasks_per_node(devices)


LONGEST = 120
# Where a job writes, how it is launched and whether it replaces an older one do not say what it is.
_UNNAMED = re.compile(r"[+~]*(hydra[./=]|(paths|launcher|logger|tags|threads|rerun)([.=@]|$))")
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9._]*")
_VALUE = re.compile(r"[A-Za-z0-9._-]+")
_NUMBER = re.compile(r"[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)


def _directory(overrides: Sequence[str], *, _root_: DictConfig) -> str:
    return directory(overrides, _root_)


def directory(overrides: Sequence[str], cfg: DictConfig) -> str:
    """Name of a job's directory in its sweep: without what it does not read, and without the list it comes from."""
    return job_name(overrides, [*unused_coefficients(cfg), "hparams_search"])


def job_name(overrides: Sequence[str], dropped: Sequence[str] = ()) -> str:
    """Name of a job's directory, such as ``method-spo_alpha-0.5_seed-1``: of ``[A-Za-z0-9._-]``, at most 120 of them.

    Two different lists of overrides have different names. ``_`` in a value is written ``__``, which keeps the name
    readable backwards; what does not fit (a path, of which the last part is shown, or other characters) is told
    apart by eight hex digits of the list's digest at the end. A name that is cut keeps its seed.

    Args:
        overrides: of the job.
        dropped: groups that are no part of what it is, such as coefficients that it does not read.
    """
    named = [text for text in map(str, overrides) if not (_UNNAMED.match(text) or _group(text) in dropped)]
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
    if lossless and len(name) <= LONGEST:
        return name
    digits = hashlib.sha256("\0".join(named).encode()).hexdigest()[:8]
    seed = next((f"_{part}" for part in parts if part.startswith("seed-")), "")
    kept = name[: LONGEST - 9]
    if len(name) > len(kept) and f"{seed}_" not in f"{kept}_":
        kept = f"{name[: LONGEST - 9 - len(seed)].rstrip('-_.')}{seed}"
    return f"{kept.rstrip('-_.') or 'job'}_{digits}"


def _group(override: str) -> str:
    return re.split(r"[.=@]", override.lstrip("+~"), maxsplit=1)[0]


def _merged(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys and values, a pair that stands for a plain number shown as that number."""
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
