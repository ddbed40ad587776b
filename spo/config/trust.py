"""Trust in the configuration of a run directory, which may come from somebody else.

A ``_target_`` runs whatever it names, so a received file could run any code. From a directory only the parts of this
package that ``conf/`` names run, each in its own group, and a few targets of torch, transformers, and lightning. All
else needs the word of the person who types the command.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from omegaconf.grammar_parser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse as parse_value

from spo.config.compose import compose, parse, register_resolvers
from spo.config.nodes import first_line, listed
from spo.errors import UserError
from spo.records import filenames
from spo.records.files import load_yaml
from spo.resources import conf_dir


def _named(prefix: str, names: str, suffix: str = "") -> frozenset[str]:
    return frozenset(f"{prefix}{name}{suffix}" for name in names.split())


LIBRARY_TARGETS: Mapping[str, frozenset[str]] = {
    "optimizer": _named(
        "torch.optim.",
        "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax Muon NAdam RAdam RMSprop Rprop SGD",
    ),
    "scheduler": _named(
        "transformers.get_",
        "constant_schedule constant_schedule_with_warmup cosine_schedule_with_warmup inverse_sqrt_schedule "
        "cosine_with_hard_restarts_schedule_with_warmup linear_schedule_with_warmup "
        "polynomial_decay_schedule_with_warmup wsd_schedule",
    )
    | _named(
        "torch.optim.lr_scheduler.",
        "Constant CosineAnnealing Exponential Linear MultiStep OneCycle Polynomial Step",
        "LR",
    ),
    "strategy": _named("lightning.pytorch.strategies.", "DDP DeepSpeed FSDP ModelParallel SingleDevice", "Strategy"),
    "logger": _named("lightning.pytorch.loggers.", "CSV TensorBoard", "Logger"),
    "trainer": _named("lightning.pytorch.profilers.", "Advanced PyTorch Simple", "Profiler"),
    "callbacks": _named(
        "lightning.pytorch.callbacks.",
        "DeviceStatsMonitor EMAWeightAveraging EarlyStopping GradientAccumulationScheduler LearningRateMonitor "
        "ModelCheckpoint ModelSummary OnExceptionCheckpoint RichModelSummary RichProgressBar "
        "StochasticWeightAveraging TQDMProgressBar ThroughputMonitor Timer WeightAveraging",
    ),
}
"""Targets of other packages that a run directory may name, by group. None of them runs code that a text names."""

# Resolvers that give the same value at every call and cannot make a node from a text.
_RESOLVERS = {"oc.env", "oc.select", "oc.dict.keys", "oc.dict.values", "oc.deprecated", "hydra"}
# Groups whose parts write files, and the names of their parameters that say where.
_WRITING_GROUPS = {"callbacks", "logger", "strategy", "trainer"}
_PLACE = re.compile(r"(path|dir|file|folder|root)$", re.IGNORECASE)
_NAME_IN_FOLDER = re.compile(r"^(filename|name|version|prefix|sub_dir)$")
# The name may be an interpolation itself.
_READ_VARIABLE = re.compile(r"oc\.env\s*:\s*([^,}]+)")
_CACHE_FOLDERS = ("sft", "pairs", "draws", "reference_logps", "verdicts.sqlite")
_WANDB_FOLDER = "wandb"
_LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
# What a configuration asks for, in words, and the words of the command that allow it.
_Found = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Caller:
    """The word of the person who types the command, in addition to the configuration of a run directory.

    Attributes:
        allowed: Targets, modules, and paths that ``--allow`` names, with everything below them.
        named: Targets that an override or a file of ``--config-dir`` names.
        keys: Keys and groups that an override sets.
    """

    allowed: tuple[str, ...] = ()
    named: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, overrides: Sequence[str] = (), allow: Sequence[str] = (), config_dir: str | Path | None = None
    ) -> Caller:
        """Return what a command line names.

        Args:
            overrides: Overrides of the command line.
            allow: Values of ``--allow``.
            config_dir: Folder of ``--config-dir``.
        """
        parsed = [parse(text) for text in overrides]
        named = {target for one in parsed for _, target in _targets({one.key_or_group.rpartition(".")[2]: one.value()})}
        files = sorted(Path(config_dir).rglob("*.yaml")) if config_dir is not None else []
        named |= {target for file in files for _, target in _targets(load_yaml(file.read_text(encoding="utf-8")))}
        return cls(tuple(filter(None, allow)), frozenset(named), frozenset(one.key_or_group for one in parsed))

    def sets(self, key: str) -> bool:
        """Return whether an override sets a key, or the group of a key."""
        parts = key.split(".")
        return any(".".join(parts[: end + 1]) in self.keys for end in range(len(parts)))

    def allows_name(self, name: str) -> bool:
        """Return whether a target or a resolver may be used."""
        return name in self.named or any(name == one or name.startswith(f"{one}.") for one in self.allowed)

    def allows_path(self, path: str) -> bool:
        """Return whether files may be written below a path."""
        return any(_is_inside(path, one) for one in self.allowed if os.path.isabs(os.path.expanduser(one)))


def check_trusted(cfg: DictConfig, run_dir: Path, caller: Caller) -> None:
    """Check that the configuration of a run directory asks for nothing that its caller must allow.

    It checks targets, remote code, files outside the run directory, links that lead out of it, and addresses that
    would receive a key. Nothing is imported but modules of this package.

    Args:
        cfg: Configuration of the directory with the caller's overrides, its interpolations unresolved.
        run_dir: Run directory.
        caller: What the caller names.

    Raises:
        UserError: Something needs the word of the caller; the message lists it, and what to add to the command.
    """
    register_resolvers()
    found = [*_code(OmegaConf.to_container(cfg, resolve=False), caller), *_links(run_dir, caller)]
    found += _tracker_settings(run_dir, caller)
    if not found:  # Only known resolvers are called.
        try:
            values: Any = OmegaConf.to_container(cfg, resolve=True)
        except OmegaConfBaseException as error:
            raise UserError(f"the configuration of {run_dir} cannot be resolved: {first_line(error)}") from error
        raw = OmegaConf.to_container(cfg, resolve=False)
        found = [*_remote_code(values, caller), *_addresses(values, raw, caller), *_places(values, run_dir, caller)]
    if found:
        problems, remedies = (list(dict.fromkeys(part)) for part in zip(*found, strict=True))
        raise UserError(
            f"{run_dir} may come from somebody else, and it {' and '.join(problems)}; if you trust it, add "
            f"{shlex.join(word for remedy in remedies for word in remedy)} to the command"
        )


# --- code ----------------------------------------------------------------------------------------------------------


def _code(raw: Any, caller: Caller) -> Iterator[_Found]:
    """Yield targets that are not allowed, and resolvers that could make one."""
    for key, target in _targets(raw):
        if not (caller.allows_name(target) or _is_known(key, target)):
            yield f"runs {target} as {key or 'the whole configuration'}", ("--allow", target)
    for key, text in _texts(raw):
        for name in _resolvers(text):
            if not (name in _RESOLVERS or name.startswith("spo.") or caller.sets(key) or caller.allows_name(name)):
                yield f"calls the resolver {name} in {key}", ("--allow", name)


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key and the text of every ``_target_`` in nested dictionaries and lists."""
    for name, value in node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ():
        if name == "_target_":
            yield key, str(value)
        yield from _targets(value, f"{key}.{name}" if key else str(name))


def _texts(node: Any) -> Iterator[tuple[str, str]]:
    """Yield the key and the value of every text in nested dictionaries and lists."""
    yield from ((at, value) for at, value in _leaves(node) if isinstance(value, str))


def _resolvers(text: str) -> Iterator[str]:
    """Yield the name of every resolver that a text calls; a name may itself be an interpolation."""
    if "${" not in text:
        return
    try:
        pending: list[Any] = [parse_value(text)]
    except GrammarParseError:  # Resolving it fails too.
        return
    while pending:
        node = pending.pop()
        if isinstance(node, OmegaConfGrammarParser.ResolverNameContext):
            yield node.getText()
        pending += [node.getChild(i) for i in range(node.getChildCount())]


def _is_known(key: str, target: str) -> bool:
    """Return whether a target may stand at a key of any run directory."""
    place = _place(key)
    if target in LIBRARY_TARGETS.get(place, ()) or target in _shipped().get(place, ()):
        return True
    if not re.fullmatch(r"spo(\.[A-Za-z_]\w*)+", target):
        return False
    # Another path to a part that conf/ names: the module that defines it, or its place in an earlier version.
    part = _part(target)
    return part is not None and any(part is _part(name) for name in _shipped().get(place, ()))


def _place(key: str) -> str:
    """Return the group of a key. The rewards of data and judge are one group."""
    parts = key.split(".")
    return "reward" if parts[-1] == "reward" else parts[0]


@cache
def _shipped() -> Mapping[str, frozenset[str]]:
    """Return the targets that the files of conf/ name, by group."""
    found: dict[str, set[str]] = {}
    for file in sorted(conf_dir().glob("*/**/*.yaml")):
        group = file.relative_to(conf_dir()).parts[0]
        for key, target in _targets(load_yaml(file.read_text(encoding="utf-8")), group):
            if target != "???":
                found.setdefault(_place(key), set()).add(target)
    return {group: frozenset(names) for group, names in found.items()}


def _part(target: str) -> Any:
    """Return the class or function of this package at a dotted path, ``None`` if it leads anywhere else."""
    module, _, name = target.rpartition(".")
    if not module.startswith("spo."):
        return None
    try:
        part = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    is_ours = isinstance(part, type | types.FunctionType) and part.__module__.startswith("spo.")
    return part if is_ours else None


# --- what else a file could ask for --------------------------------------------------------------------------------


def _remote_code(values: Any, caller: Caller) -> Iterator[_Found]:
    """Yield keys that let code in a model folder run."""
    for key, value in _leaves(values):
        if key.rpartition(".")[2] == "trust_remote_code" and value not in (False, None) and not caller.sets(key):
            yield f"lets code in a model folder run ({key}={value})", (f"{key}=true",)


def _addresses(values: Any, raw: Any, caller: Caller) -> Iterator[_Found]:
    """Yield addresses on other machines that would receive a value from the environment."""
    for key, value in _leaves(values):
        parent, _, name = key.rpartition(".")
        if name != "base_url" or caller.sets(key) or value == _official_address():
            continue
        if urlsplit(str(value)).hostname in _LOCAL_HOSTS:
            continue
        variable = next((other for at, other in _leaves(values) if at == f"{parent}.key_variable"), None)
        if variable is not None:
            yield f"sends the key in {variable} to {value}", (f"{key}={value}",)
        elif parent:  # An interpolation may lead from the request to any key that reads the environment.
            read = sorted(_variables(raw) - _shipped_variables())
            if read:
                yield f"may send {listed(read)} of the environment to {value}", (f"{key}={value}",)


def _variables(node: Any) -> set[str]:
    """Return the names of environment variables that the texts in nested dictionaries and lists read."""
    return {name for _, text in _texts(node) for name in _READ_VARIABLE.findall(text)}


@cache
def _shipped_variables() -> frozenset[str]:
    files = conf_dir().glob("*/**/*.yaml")
    return frozenset().union(*(_variables(load_yaml(file.read_text(encoding="utf-8"))) for file in files))


@cache
def _official_address() -> str:
    return str(load_yaml((conf_dir() / "judge" / "openai.yaml").read_text(encoding="utf-8"))["base_url"])


def _places(values: Any, run_dir: Path, caller: Caller) -> Iterator[_Found]:
    """Yield files and folders outside the run directory that a part would write."""
    cache_dir = str(values.get("paths", {}).get("cache") or "")
    if cache_dir and not (caller.sets("paths.cache") or caller.allows_path(cache_dir) or _is_cache(cache_dir)):
        yield f"uses the folder {cache_dir} as its cache", ("--allow", _absolute(cache_dir))
    for key, value in _leaves(values):
        group, _, rest = key.partition(".")
        parent, _, name = rest.rpartition(".")
        if not isinstance(value, str) or not value or caller.sets(key):
            continue
        if group in _WRITING_GROUPS:
            if _NAME_IN_FOLDER.match(name):
                is_inside = not os.path.isabs(value) and ".." not in Path(value).parts
            # What a positional argument means is not known here.
            elif (
                _PLACE.search(name)
                or parent.endswith("_args_")
                or name == "_args_"
                or os.path.isabs(value)
                or value.startswith("~")
            ):
                is_inside = _is_inside(value, run_dir)
            else:
                continue
        elif name == "cache" and group != "paths":
            is_inside = _is_inside(value, run_dir) or _is_inside(value, cache_dir)
        else:
            continue
        if not is_inside and not caller.allows_path(value):
            yield f"writes outside its own folder ({key}={value})", ("--allow", _absolute(value))


def _links(run_dir: Path, caller: Caller) -> Iterator[_Found]:
    """Yield links in the run directory that lead out of it: what is written there would land elsewhere."""
    # A round holds the run of its extrapolated policy.
    of_wandb = [str(run / _WANDB_FOLDER) for run in (run_dir, run_dir / filenames.EXTRAPOLATED)]
    for folder, folders, files in os.walk(run_dir):
        for name in sorted([*folders, *files]):
            path = os.path.join(folder, name)
            if os.path.islink(path) and not _is_inside(path, run_dir) and not caller.allows_path(path):
                target = os.path.realpath(path)
                yield f"has a link out of it ({os.path.relpath(path, run_dir)} to {target})", ("--allow", target)
        if folder in of_wandb:
            # W&B links the folder of each run to its log in the user's cache, and never writes to that folder again.
            folders.clear()


def _tracker_settings(run_dir: Path, caller: Caller) -> Iterator[_Found]:
    """Yield settings of W&B, which its client reads in the current folder; they may name a server for the API key."""
    file = run_dir / _WANDB_FOLDER / "settings"
    if file.exists() and not caller.allows_path(str(file)):
        yield f"has settings of W&B ({_WANDB_FOLDER}/{file.name})", ("--allow", _absolute(file))


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of everything that is neither a dictionary nor a list."""
    children: Iterable[tuple[Any, Any]]
    if isinstance(node, Mapping):
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    else:
        yield key, node
        return
    for name, value in children:
        yield from _leaves(value, f"{key}.{name}" if key else str(name))


def _absolute(path: str | Path) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _is_inside(path: str | Path, folder: str | Path) -> bool:
    """Return whether a path lies in a folder, with links followed; an address such as ``s3://x`` does not."""
    if not str(folder) or "://" in str(path):
        return False
    inner, outer = _absolute(path), _absolute(folder)
    return inner == outer or inner.startswith(outer.rstrip(os.sep) + os.sep)


def _is_cache(folder: str) -> bool:
    """Return whether a folder is a cache of this package, or one can be made there."""
    path = Path(folder).expanduser()
    if not path.exists() or any((path / name).exists() for name in _CACHE_FOLDERS):
        return True
    own = compose(run_dir=".").paths.cache  # What a new run of the caller would use.
    return path.is_dir() and (not any(path.iterdir()) or _absolute(folder) == _absolute(own))
