"""Everything that can be wrong with a configuration, found at once and said in words, before a model is loaded."""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from spo.runtime.config import composer, parse, parser, sugar
from spo.runtime.errors import ConfigProblems, UserError, missing_package
from spo.runtime.groups import conf_dir, group_members
from spo.runtime.unread import COEFFICIENTS, unread

HINTS = {
    "model.path": "a Hugging Face folder or hub name",
    "data.path": "the file, folder or hub name of your preference pairs",
    "alpha.target": "the entropy of the policy to aim for, in nats per token",
    "beta.target": "the KL of the policy to the reference to aim for, in nats per sequence",
    "alpha.values": "a list of positive numbers, one per optimiser step",
    "beta.values": "a list of positive numbers, one per optimiser step",
}
# What must be a whole number, and the least it may be.
COUNTS = {
    "seed": 0,
    "threads": 1,
    "data.seed": 0,
    "data.batch_size": 1,
    "data.micro_batch_size": 1,
    "data.eval_batch_size": 1,
    "data.num_workers": 0,
    "data.max_length": 2,
    "data.max_new_tokens": 1,
    "data.min_pairs": 1,
    "data.source.num_prompts": 1,
    "data.source.num_symbols": 2,
    "data.source.prompt_symbols": 0,
    "data.source.num_pairs": 1,
    "data.source.list_size": 2,
    "trainer.max_steps": 0,
    "trainer.val_check_interval": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.num_nodes": 1,
    "sft.max_steps": 0,
    "sft.batch_size": 1,
    "sft.num_warmup_steps": 0,
    "evaluation.num_prompts": 1,
    "evaluation.samples_per_prompt": 1,
    "evaluation.max_new_tokens": 1,
    "evaluation.batch_size": 1,
    "evaluation.bootstrap_samples": 1,
    "probe.num_prompts": 0,
    "probe.max_new_tokens": 1,
    "evaluation.seed": 0,
    "evaluation.self_bleu_samples": 0,
    "data.limit": 1,
    "data.source.max_responses": 2,
    "reference.batch_size": 1,
    "regularizer.refresh_every": 1,
    "regularizer.num_samples": 1,
    "regularizer.batch_size": 1,
    "regularizer.max_new_tokens": 1,
    "scheduler.num_warmup_steps": 0,
    "alpha.every": 1,
    "beta.every": 1,
}
BOOLEANS = ("rerun", "model.trust_remote_code", "model.gradient_checkpointing", "trainer.enable_progress_bar")
PRECISIONS = ("32-true", "32", "bf16-mixed", "64-true")
# Parameters of Lightning's Trainer that follow from other keys.
NOT_THE_TRAINERS = {
    "accumulate_grad_batches": "use data.micro_batch_size: it never changes a gradient",
    "logger": "choose a member of the group logger",
    "callbacks": "use the group callbacks",
    "strategy": "use the group strategy",
    "plugins": "use the group strategy",
    "max_epochs": "use trainer.max_steps",
    "min_epochs": "use trainer.max_steps",
    "check_val_every_n_epoch": "use trainer.val_check_interval, in optimiser steps",
    "use_distributed_sampler": "the data module deals the pairs to devices itself",
    "enable_checkpointing": "use callbacks=none",
    "enable_model_summary": "the start panel shows the parameters",
    "default_root_dir": "use hydra.run.dir",
    "gradient_clip_algorithm": "gradients are clipped by their norm",
    "reload_dataloaders_every_n_epochs": "the data module is read once",
}
# Packages that a target needs only when it is used, by the name of its class.
NEEDED_BY = {"DeepSpeedStrategy": "deepspeed", "TensorBoardLogger": "tensorboard"}
_DIRECTIVES = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


# --- a composed configuration --------------------------------------------------------------------------------------


def ensure(cfg: DictConfig) -> None:
    """Raises :class:`ConfigProblems` with everything that is wrong with ``cfg``."""
    if found := problems(cfg):
        raise ConfigProblems(found)


def problems(cfg: DictConfig) -> list[str]:
    """Missing values, wrong values and impossible combinations, one sentence each.

    Args:
        cfg: a composed configuration, with or without Hydra's own node.
    """
    found = [*_missing_and_unresolved(cfg), *_targets(cfg), *_values(cfg), *_trainer(cfg), *_model(cfg), *_data(cfg)]
    return list(dict.fromkeys([*found, *_parts_and_combinations(cfg, found)]))


def warnings(cfg: DictConfig) -> list[str]:
    """What is allowed, and yet probably not meant."""
    loss, regularizer = _build(cfg, "method.loss"), _build(cfg, "regularizer")
    name, found = _select(cfg, "method.name"), []
    not_read = unread(cfg)
    if "alpha" in not_read and _changed(cfg, "alpha", "data.default_alpha"):
        found.append(f"{name} does not read alpha: what you set it to has no effect")
    if "beta" in not_read and _changed(cfg, "beta", "method.default_beta"):
        found.append(f"nothing reads beta in {name} with this regularizer: what you set it to has no effect")
    for key in (name for name in COEFFICIENTS if name not in not_read):
        every, steps = _select(cfg, f"{key}.every"), _select(cfg, "trainer.max_steps")
        if every is not None and every > steps:
            found.append(f"{key}.every={every} is more than trainer.max_steps={steps}: {key} is never adjusted")
    if getattr(regularizer, "source", None) == "policy" and _select(cfg, "probe.num_prompts") == 0:
        found.append(
            "probe.num_prompts=0 leaves the regularizer out of val/loss: it is measured on the probe's samples"
        )
    if getattr(regularizer, "estimator", None) == "k1":
        found.append(
            "regularizer.estimator=k1 measures the KL and does not regularise: its gradient is zero in expectation; "
            "tokenwise, unbiased and k2 have a gradient of the KL"
        )
    if _select(cfg, "model.adapter_path") is not None:
        found.append("model.adapter_path brings its own rank, scale and targets: model.lora.* is not read")
    micro = _select(cfg, "data.micro_batch_size")
    if loss is not None and _declares(loss, "uses_batch_statistics") and micro is not None:
        found.append(
            f"{name} weighs each pair against those forwarded with it, so data.micro_batch_size={micro} changes its "
            "gradients"
        )
    return found


def _changed(cfg: DictConfig, group: str, default_key: str) -> bool:
    default = _select(cfg, default_key)
    return _select(cfg, group) is not None and _select(cfg, f"{group}.value") != (0.1 if default is None else default)


def _declares(loss: Any, name: str) -> bool:
    from spo.losses import PreferenceLoss

    return bool(getattr(loss, name, getattr(PreferenceLoss, name)))  # a loss from outside may declare nothing


def _missing_and_unresolved(cfg: DictConfig) -> Iterator[str]:
    for key, node, name in _entries(cfg):
        if OmegaConf.is_missing(node, name):
            hint = f": {HINTS[key]}" if key in HINTS else ""
            yield f"{key} has no value{hint} ({key}=...)"
        elif OmegaConf.is_interpolation(node, name):
            try:
                node[name]
            except InterpolationToMissingValueError:
                pass  # what it points to is reported by itself
            except OmegaConfBaseException as error:
                yield f"{key}: {_first_line(error)}"


def _targets(cfg: DictConfig) -> Iterator[str]:
    for key, node in _nodes_with_target(cfg):
        path = node.get("_target_")
        try:
            target = locate(str(path))
        except ImportError as error:
            yield f"{key}: {error}"
            continue
        package = NEEDED_BY.get(getattr(target, "__name__", ""))
        if package is not None and importlib.util.find_spec(package) is None:
            yield f"{key}: {missing_package(package)}"
        yield from _arguments(key, node, target)
    if _select(cfg, "model.lora") is not None and importlib.util.find_spec("peft") is None:
        yield f"model.lora: {missing_package('peft')}"


def _arguments(key: str, node: DictConfig, target: Callable[..., Any]) -> Iterator[str]:
    try:
        parameters = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # some builtins have no signature
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = [str(name) for name in node if name not in _DIRECTIVES]
    for name in given:
        if name not in names and not takes_any:
            short = str(node.get("_target_")).rpartition(".")[2]
            yield f"{key}.{name}: {short} has no such parameter{_suggestion(name, names)}"
    if not (node.get("_partial_") or node.get("_args_")):
        for name in names:
            if name not in given and parameters[name].default is inspect.Parameter.empty:
                yield f"{key}.{name} has no value ({key}.{name}=...)"
    for name, options in _literals(target).items():
        value = _select(node, name)
        if name in given and value is not None and value not in options:
            yield f"{key}.{name}={value}: choose {_listed(options)}{_suggestion(str(value), options)}"


def _literals(target: Callable[..., Any]) -> dict[str, list[str]]:
    """Parameters that are one of a few words, with those words."""
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # hints are help only: names that exist for type checkers alone cannot be resolved
        return {}
    return {
        name: [str(option) for option in typing.get_args(hint)]
        for name, hint in hints.items()
        if typing.get_origin(hint) is Literal
    }


def _values(cfg: DictConfig) -> Iterator[str]:
    for key, least in COUNTS.items():
        value = _select(cfg, key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            yield f"{key}={value}: must be a whole number"
        elif value < least:
            yield f"{key}={value}: must be at least {least}"
    for key in BOOLEANS:
        value = _select(cfg, key)
        if value is not None and not isinstance(value, bool):
            yield f"{key}={value}: must be true or false"
    for key, (holds, words) in _RANGES.items():
        value = _select(cfg, key)
        if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool) and holds(value)):
            yield f"{key}={value}: must be {words}"


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "data.splits.selection": (lambda x: 0 < x < 1, "a share of the prompts, above 0 and below 1"),
    "data.splits.test": (lambda x: 0 < x < 1, "a share of the prompts, above 0 and below 1"),
    "evaluation.confidence": (lambda x: 0 < x < 1, "between 0 and 1"),
    "evaluation.temperature": (lambda x: x > 0, "a positive number"),
    "model.dropout": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "model.lora.dropout": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "model.lora.r": (lambda x: x >= 1, "at least 1"),
    "optimizer.lr": (lambda x: x > 0, "a positive number"),
    "sft.clip_norm": (lambda x: x > 0, "a positive number, or null for no clipping"),
    "sft.lr": (lambda x: x > 0, "a positive number"),
    **{
        f"{name}.{key}": (lambda x: 0 < x < float("inf"), "a positive number")
        for name in ("alpha", "beta")
        for key in ("value", "start", "end", "target", "rate", "min", "max")
    },
    "trainer.gradient_clip_val": (lambda x: x > 0, "a positive number, or null for no clipping"),
}


def _trainer(cfg: DictConfig) -> Iterator[str]:
    for name, instead in NOT_THE_TRAINERS.items():
        if name in (_select(cfg, "trainer") or {}):
            yield f"trainer.{name} is not for you to set: {instead}"
    precision = str(_select(cfg, "trainer.precision"))
    if re.fullmatch(r"(transformer-engine-float)?16(-mixed|-true)?", precision):
        yield (
            f"trainer.precision={precision}: half precision is not supported, its range is too small for summed "
            "log-probabilities; use bf16-mixed or 32-true"
        )
    elif precision not in PRECISIONS:
        yield (
            f"trainer.precision={precision}: choose {_listed(PRECISIONS)}; weights in bfloat16 are "
            "model.dtype=bfloat16, for policy and reference alike"
        )
    devices = _select(cfg, "trainer.devices")
    if devices == 0 or str(devices) == "0":
        yield "trainer.devices=0: must be a number of devices, a list of them, or auto"
    accelerator, known = str(_select(cfg, "trainer.accelerator")), ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
    if accelerator not in known:
        yield f"trainer.accelerator={accelerator}: choose {_listed(known)}{_suggestion(accelerator, known)}"


def _model(cfg: DictConfig) -> Iterator[str]:
    model = _select(cfg, "model")
    if not isinstance(model, DictConfig):
        return
    path, initial = _select(cfg, "model.path"), _select(cfg, "model.initial")
    lora, adapter = _select(cfg, "model.lora"), _select(cfg, "model.adapter_path")
    if path is not None and initial is not None:
        yield f"model.path={path}: this model makes its own weights; for yours write model=hf model.path={path}"
    elif path is not None:
        yield from _model_folder("model.path", str(path), "config.json")
    elif initial is None and not OmegaConf.is_missing(model, "path"):
        yield "model.path and model.initial are both null: one of them has to say where the model comes from"
    if adapter is not None:
        if lora is None:
            yield f"model.adapter_path={adapter}: an adapter needs model.lora; write model=hf_lora"
        yield from _model_folder("model.adapter_path", str(adapter), "adapter_config.json")
    dtype = _select(cfg, "model.dtype")
    if dtype is not None and not _is_dtype(str(dtype)):
        names = ["float32", "bfloat16", "float64"]
        yield f"model.dtype={dtype}: choose {_listed(names)}{_suggestion(str(dtype), names)}"
    yield from _table(cfg)


def _table(cfg: DictConfig) -> Iterator[str]:
    if _select(cfg, "model.initial._target_") != "spo.models.tabular.build":
        return
    if _select(cfg, "data.tokenizer") is None:
        yield "model=tabular needs a data set with a vocabulary of its own: data=enumerable"
        return
    from spo.models.tabular import check_size

    tokenizer, context = _build(cfg, "data.tokenizer"), _select(cfg, "model.initial.context")
    if tokenizer is not None and isinstance(context, int):
        try:
            check_size(len(tokenizer), context)
        except ValueError as error:
            yield str(error)


def _is_dtype(name: str) -> bool:
    import torch

    dtype = getattr(torch, name, None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype is not torch.float16


def _model_folder(key: str, path: str, config: str) -> Iterator[str]:
    if path.startswith("~"):
        yield f"{key}={path}: write the folder out in full, ~ is not expanded"
    elif Path(path).is_dir():
        if not (Path(path) / config).is_file():
            yield f"{key}={path}: there is no {config} in this folder; is it a Hugging Face model folder?"
    elif Path(path).is_file():
        yield f"{key}={path}: this is a file; give the folder that holds it"
    elif looks_like_path(path):
        yield f"{key}={path}: there is no such folder (seen from {Path.cwd()})"


def looks_like_path(name: str) -> bool:
    """Whether a name that may be one of the hub can only be meant as a path on this machine."""
    parts = name.split("/")
    return name.startswith(("/", ".", "~")) or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())


def _data(cfg: DictConfig) -> Iterator[str]:
    path = _select(cfg, "data.path")
    absent = path is not None and not Path(str(path)).expanduser().exists()
    if absent and (_reads_files(cfg) or looks_like_path(str(path))):
        yield f"data.path={path}: there is no such file or folder (seen from {Path.cwd()})"
    truncation = _select(cfg, "data.truncation")
    from spo.data.rendering import TRUNCATIONS

    if truncation is not None and truncation not in TRUNCATIONS:
        yield f"data.truncation={truncation}: choose {_listed(TRUNCATIONS)}{_suggestion(str(truncation), TRUNCATIONS)}"
    on_bad_row, options = _select(cfg, "data.on_bad_row"), ("stop", "skip")
    if on_bad_row is not None and on_bad_row not in options:
        yield f"data.on_bad_row={on_bad_row}: choose {_listed(options)}"
    shares = [_select(cfg, f"data.splits.{name}") for name in ("selection", "test")]
    if all(isinstance(share, int | float) and 0 <= share < 1 for share in shares) and sum(shares) >= 1:
        yield f"data.splits: selection={shares[0]} and test={shares[1]} leave no prompt to train on"
    batch, micro = _select(cfg, "data.batch_size"), _select(cfg, "data.micro_batch_size")
    if isinstance(batch, int) and isinstance(micro, int) and micro > batch:
        yield f"data.micro_batch_size={micro} exceeds data.batch_size={batch}: it is a part of the batch"
    if str(_select(cfg, "data.source._target_")).endswith(".EnumerableSource"):
        symbols, new = _select(cfg, "data.source.prompt_symbols"), _select(cfg, "data.max_new_tokens")
        length = _select(cfg, "data.max_length")
        whole = isinstance(symbols, int) and isinstance(new, int) and length != 1 + symbols + new
        if whole or truncation != "trim_completion":
            yield (
                "data=enumerable: data.max_length and data.truncation follow from the language, so that tokens are "
                "what sampling gives; set data.max_new_tokens and data.source.prompt_symbols instead"
            )


def _reads_files(cfg: DictConfig) -> bool:
    from spo.data import FileSource, HHSource

    try:
        source = locate(str(_select(cfg, "data.source._target_")))
    except ImportError:
        return False
    return inspect.isclass(source) and issubclass(source, (FileSource, HHSource))


def _parts_and_combinations(cfg: DictConfig, found: Sequence[str]) -> Iterator[str]:
    said: list[str] = []
    cheap = ["alpha", "beta", "method.loss", "regularizer", "optimizer"]
    if str(_select(cfg, "data.source._target_")).startswith("spo."):
        cheap.append("data.source")
    # A node with a problem of its own is left out: making it would only say the same again.
    sound = [key for key in cheap if not any(problem.startswith((f"{key}.", f"{key}:")) for problem in found)]
    parts = {key: _build(cfg, key, said) if key in sound else None for key in cheap}
    _try_optimizer(parts["optimizer"], said)
    yield from said
    loss, regularizer = parts["method.loss"], parts["regularizer"]
    if loss is not None and not callable(loss):
        yield f"method.loss: {type(loss).__name__} is no loss, it cannot be called"
    reference = _reference_class(cfg)
    if loss is None or regularizer is None or reference is None:
        return
    method, member = _select(cfg, "method.name"), _member("reference", reference)
    scores_pairs, scores_samples = (getattr(reference, name, True) for name in ("scores_pairs", "scores_samples"))
    source = getattr(regularizer, "source", None)
    if source == "enumeration" and not hasattr(parts.get("data.source"), "language"):
        yield (
            f"regularizer={_member('regularizer', type(regularizer))} sums over every response, which takes a data set "
            "that can be enumerated: choose data=enumerable, or regularizer=global_kl"
        )
    if getattr(parts.get("data.source"), "yields_lists", False) and not _reads_whole(loss):
        yield (
            f"method={method} compares two completions, but the data has lists of more: choose "
            f"{_listed(f'method={name}' for name in _list_methods())}, or lists of two "
            "(data.source.max_responses=2 in data=ranked_jsonl, data.source.list_size=2 in data=enumerable)"
        )
    if _declares(loss, "uses_lists") and not hasattr(loss, "of_ranking"):
        yield f"method.loss: {type(loss).__name__} declares uses_lists: derive it from spo.losses.ListLoss"
    if _declares(loss, "uses_reference") and not scores_pairs:
        yield f"method={method} compares with a reference model, but reference={member}: choose reference=frozen"
    if source is not None and not scores_samples:
        yield (
            f"regularizer={_member('regularizer', type(regularizer))} scores sequences with the reference model, which "
            f"reference={member} has not: choose reference=frozen (or adapter_off with model=hf_lora)"
        )
    if scores_pairs and not scores_samples and source is None and not _declares(loss, "uses_reference"):
        yield f"reference={member}: nothing reads the log-probabilities it would compute; choose reference=none"
    if member == "adapter_off" and _select(cfg, "model.lora") is None:
        yield "reference=adapter_off needs an adapter to switch off, but model.lora is null: choose model=hf_lora"
    if source is not None and getattr(regularizer, "weight", None) == "beta" and _declares(loss, "uses_beta"):
        yield (
            f"regularizer.weight=beta: {method} reads beta itself, so the regularizer needs a number of its own, "
            "such as regularizer.weight=0.01"
        )
    for name in COEFFICIENTS:
        watched = getattr(parts[name], "watches", None)
        if watched is None or name in unread(cfg):
            continue
        chosen = f"{name}={_member(name, type(parts[name]))}"
        if _select(cfg, "probe.num_prompts") == 0:
            yield f"{chosen} measures the policy on the probe's samples, but probe.num_prompts=0: give it some, say 16"
        if watched == "kl" and not scores_samples:
            yield f"{chosen} measures the KL to a reference model, which reference={member} has not: choose frozen"


def _reads_whole(loss: Any) -> bool:
    """Whether nothing of a list of completions is lost on the loss; supervised methods want the best one alone."""
    return _declares(loss, "uses_lists") or not _declares(loss, "uses_rejected")


def _list_methods() -> list[str]:
    """The shipped methods that read lists."""
    found = []
    for file in sorted((conf_dir() / "method").glob("*.yaml")):
        if _declares(locate(str(OmegaConf.select(OmegaConf.load(file), "loss._target_"))), "uses_lists"):
            found.append(file.stem)
    return found


def _try_optimizer(make: Any, said: list[str]) -> None:
    if make is None:
        return
    import torch

    try:
        make([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        said.append(f"optimizer: {_first_line(error)}")


def _reference_class(cfg: DictConfig) -> Any:
    try:
        return locate(str(_select(cfg, "reference._target_")))
    except ImportError:
        return None


def _member(group: str, cls: type) -> str:
    """Name of the shipped member of a group that makes ``cls``, or the name of the class."""
    for file in sorted((conf_dir() / group).glob("*.yaml")):
        target = OmegaConf.select(OmegaConf.load(file), "_target_")
        if target is not None and str(target).rpartition(".")[2] == cls.__name__:
            return file.stem
    return cls.__name__


def _build(cfg: DictConfig, key: str, said: list[str] | None = None) -> Any:
    """What the node makes; ``None``, and a problem said, where it cannot be made."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    node = _select(cfg, key)
    if not isinstance(node, DictConfig):
        return None
    try:
        return instantiate(node, _convert_="all")
    except OmegaConfBaseException:  # a missing or unresolved value, reported by itself
        return None
    except InstantiationException as error:
        cause = error.__cause__ or error
        if not isinstance(cause, ValueError | TypeError | InstantiationException):
            raise  # no wrong value, but a fault in the code
        if said is not None:
            said.append(_first_line(cause) if _first_line(cause).startswith(key) else f"{key}: {_first_line(cause)}")
        return None


# --- the command line ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run: its overrides, and what they compose to (``paths.run`` set)."""

    overrides: list[str]
    cfg: DictConfig


@dataclass(frozen=True)
class Plan:
    """What a command line asks for.

    Attributes:
        overrides: the command line's, numbers for alpha and beta written out.
        jobs: the runs; of a sweeper that proposes its jobs one by one, only a first one.
        multirun: whether they are jobs of a multirun.
    """

    overrides: list[str]
    jobs: list[Job]
    multirun: bool


def plan(
    overrides: Sequence[str], *, multirun: bool = False, config_dir: str | Path | None = None, complete: bool = True
) -> Plan:
    """Reads a command line and checks every run it asks for.

    Args:
        overrides: as typed.
        multirun: whether ``-m`` was given.
        config_dir: folder with further members of the groups.
        complete: false checks only that the overrides can be used, not what they amount to.

    Raises:
        ConfigProblems: with everything that is wrong in any of the jobs.
        UserError: the folder of further members does not exist.
    """
    found: list[str] = []
    usable = _readable(overrides, found)
    with composer(config_dir) as composed:
        composing = _Composing(composed, config_dir)
        single = [_first_value(override) for override in usable]
        first_said: list[str] = []
        first, first_unsure = composing.compose(single, first_said)
        multirun = multirun or first.hydra.mode == RunMode.MULTIRUN
        if not multirun:
            several = [override for override in usable if parse(override).is_sweep_override()]
            found += [f"{o}: has several values; add -m for one run each, or write a list as [..]" for o in several]
            lists = [single]
        else:
            lists = _expand(usable, first)
        per_job: list[list[str]] = []
        jobs: list[Job] = []
        for job_overrides in lists:
            if job_overrides == single:
                said, cfg, unsure = list(first_said), copy.deepcopy(first), first_unsure
            else:
                said = []
                cfg, unsure = composing.compose(job_overrides, said)
            certain = not unsure and not (multirun and said)  # the other jobs tell the rest
            said += composing.unread(cfg, job_overrides) if complete else []
            run_dir = str(Path(str(cfg.hydra.run.dir)).absolute())
            with open_dict(cfg):
                del cfg["hydra"]
            cfg.paths.run = run_dir
            if complete:
                said += problems(cfg) if certain else _missing_and_unresolved(cfg)
            per_job.append(said)
            jobs.append(Job(job_overrides, cfg))
    found += [problem for problem in _over_jobs(per_job, lists) if problem not in found]
    if found:
        raise ConfigProblems(list(dict.fromkeys(found)))
    return Plan(usable, jobs, multirun)


def _readable(overrides: Sequence[str], found: list[str]) -> list[str]:
    usable: list[str] = []
    for override in overrides:
        try:
            parse(override)
            usable += sugar([override])
        except UserError as error:
            found.append(str(error))
    return usable


def _first_value(text: str) -> str:
    override = parse(text)
    if not override.is_sweep_override():
        return text
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.start}"
    override.config_loader = parser().config_loader
    return f"{override.get_key_element()}={next(override.sweep_string_iterator(), 'null')}"


def _expand(overrides: Sequence[str], cfg: DictConfig) -> list[list[str]]:
    """The jobs of a multirun, as Hydra's own sweeper makes them."""
    sweeper = cfg.hydra.sweeper
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    if not str(sweeper.get("_target_")).endswith(".BasicSweeper"):
        return [[_first_value(override) for override in overrides]]
    task = [text for text in [*params, *overrides] if not parse(text).is_hydra_override()]
    own = [text for text in overrides if parse(text).is_hydra_override()]
    [jobs] = BasicSweeper.split_arguments(parser().parse_overrides(task), None)
    return [[*own, *job] for job in jobs]


def _over_jobs(per_job: list[list[str]], lists: list[list[str]]) -> Iterator[str]:
    """Problems of all jobs once each; with the job where only some have it."""
    for problem in dict.fromkeys(itertools.chain.from_iterable(per_job)):
        having = [job for job, said in zip(lists, per_job, strict=True) if problem in said]
        if len(having) == len(lists):
            yield problem
        else:
            others = f" and {len(having) - 1} more" if len(having) > 1 else ""
            yield f"{problem} [job {' '.join(having[0])}{others}]"


class _Composing:
    """Composes with Hydra, which stops at its first bad override, and finds all of them."""

    def __init__(self, composed: Callable[[Sequence[str]], DictConfig], config_dir: str | Path | None) -> None:
        self.composed = composed
        self.folders = [Path(config_dir).absolute()] if config_dir is not None else []
        self.folders.append(conf_dir())
        self.groups = group_members(self.folders)
        self._baselines: dict[tuple[tuple[str, str], ...], set[str]] = {}

    def compose(self, overrides: Sequence[str], found: list[str]) -> tuple[DictConfig, bool]:
        """What the usable ones of the overrides compose to; the others are added to ``found``.

        Returns:
            The configuration, and whether too little was usable to judge it.
        """
        try:
            return self.composed(overrides), False
        except (HydraException, OmegaConfBaseException, ValueError):
            pass
        accepted: list[str] = []
        dropped: set[str] = set()
        cfg = self.composed([])
        # Groups first: what keys exist depends on them. Each is tried on top of those that are fine.
        for text in sorted(overrides, key=lambda text: not self._is_group(parse(text))):
            override = parse(text)
            if override.key_or_group.partition(".")[0] in dropped:
                continue
            try:
                cfg = self.composed([*accepted, text])
                accepted.append(text)
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                found.append(f"{text}: {self._words(override, cfg, error)}")
                if not self._is_group(override):
                    continue
                # Further problems are looked for as if the right member had been named.
                for repaired in self._repaired(override):
                    try:
                        cfg = self.composed([*accepted, repaired])
                        accepted.append(repaired)
                        break
                    except (HydraException, OmegaConfBaseException, ValueError):
                        continue
                else:
                    dropped.add(override.key_or_group)
        return cfg, bool(dropped)

    def _is_group(self, override: Override) -> bool:
        return override.key_or_group in self.groups or "/" in override.key_or_group

    def _repaired(self, override: Override) -> list[str]:
        group = override.key_or_group
        members = difflib.get_close_matches(str(override.value()), self.groups.get(group, []), n=1)
        return [f"{plus}{group}={member}" for member in members for plus in ("", "+")]

    def _words(self, override: Override, cfg: DictConfig, error: Exception) -> str:
        key, text = override.key_or_group, str(error)
        if plugin := re.search(r"Could not find 'hydra/(launcher|sweeper)/(\w+)'", text):
            name = {"submitit_slurm": "submitit"}.get(plugin[2], plugin[2])
            if words := missing_package(f"hydra_plugins.hydra_{name}_{plugin[1]}"):
                return words
        members = self.groups.get(key)
        if members is not None:
            if f"+{key}=" in text and override.type is OverrideType.CHANGE:
                return f"write it with a plus, +{override.input_line}"
            known = f"the group has {_listed(members)}" if members else "it has no members"
            if str(override.value()) not in members:
                return f"no such member of {key}{_suggestion(str(override.value()), members)}; {known}"
        if override.is_delete():
            return "there is nothing to delete"
        if "Could not append" in text:
            return f"the key exists already; write {str(override.input_line).lstrip('+')}"
        if "Could not override" in text or "is not in struct" in text:
            return f"unknown key{_key_suggestion(key, cfg, self.groups)}"
        return _first_line(error)

    def unread(self, cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
        """Keys that were added, by ``+`` or in a preset, and that nothing reads."""
        choices = {
            str(group): str(member)
            for group, member in cfg.hydra.runtime.choices.items()
            if member is not None and not str(group).startswith("hydra/")
        }
        presets = {group for group, member in choices.items() if self._is_preset(group, member)}
        if not presets and not any(text.startswith("+") for text in overrides):
            return []
        known = self._keys_of({group: member for group, member in choices.items() if group not in presets})
        raw = OmegaConf.to_yaml(cfg)
        found: list[str] = []
        for key in sorted(_keys(cfg) - known):
            parent = key.rpartition(".")[0]
            if any(key.startswith(f"{reported.partition(':')[0]}.") for reported in found):
                continue
            if _in_target(cfg, key) or f"${{{key}" in raw or _is_open(known, parent):
                continue
            found.append(f"{key}: nothing reads this key{_suggestion(key, sorted(known))}")
        return found

    def _is_preset(self, group: str, member: str) -> bool:
        files = (folder / group / f"{member}.yaml" for folder in self.folders)
        return any(file.is_file() and re.search(r"^# *@package _global_", file.read_text(), re.M) for file in files)

    def _keys_of(self, choices: dict[str, str]) -> set[str]:
        frozen = tuple(sorted(choices.items()))
        if frozen not in self._baselines:
            default = self.composed([]).hydra.runtime.choices
            chosen = [f"{group}={member}" if group in default else f"+{group}={member}" for group, member in frozen]
            self._baselines[frozen] = _keys(self.composed(chosen))
        return self._baselines[frozen]


# --- small parts ---------------------------------------------------------------------------------------------------

_ABSENT = object()


def locate(path: str) -> Any:
    """The object a ``_target_`` names.

    Raises:
        ImportError: in words.
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
                raise ImportError(f"there is no {path}{_suggestion(name, [n for n in dir(found) if n[0] != '_'])}")
            found = getattr(found, name)
        return found
    hint = "is the folder that holds it the current one, or on PYTHONPATH?"
    raise ImportError(missing_package(path) or f"there is no module {parts[0]} to take {path} from; {hint}")


def _entries(cfg: DictConfig | ListConfig, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key, with the node that holds it and its name there; interpolations are not followed."""
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
            yield from _entries(value, f"{key}.")


def _keys(cfg: DictConfig) -> set[str]:
    return {key for key, node, _ in _entries(cfg) if isinstance(node, DictConfig)}


def _nodes_with_target(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    for key, node, name in _entries(cfg):
        if name == "_target_" and not OmegaConf.is_missing(node, name):
            yield key.rpartition(".")[0], node


def _in_target(cfg: DictConfig, key: str) -> bool:
    parents = list(itertools.accumulate(key.split(".")[:-1], lambda a, b: f"{a}.{b}"))
    return any(_select(cfg, f"{parent}._target_") is not None for parent in parents)


def _is_open(known: set[str], parent: str) -> bool:
    """Whether a mapping takes whatever keys it is given: the loggers, the callbacks, one that is empty by default."""
    return parent in ("logger", "callbacks") or (parent in known and not any(k.startswith(f"{parent}.") for k in known))


def _select(cfg: DictConfig, key: str, default: Any = None) -> Any:
    try:
        return OmegaConf.select(cfg, key, default=default, throw_on_missing=False)
    except OmegaConfBaseException:
        return default


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _key_suggestion(key: str, cfg: DictConfig, groups: Iterable[str]) -> str:
    keys = _keys(cfg) | set(groups)
    parent, _, leaf = key.rpartition(".")
    siblings = sorted(known.rpartition(".")[2] for known in keys if parent and known.rpartition(".")[0] == parent)
    if close := difflib.get_close_matches(leaf, siblings, n=1):
        return f"; did you mean {parent}.{close[0]}?"
    if siblings:
        return f"; {parent} has {', '.join(name for name in siblings if name not in _DIRECTIVES)}"
    same_leaf = sorted(known for known in keys if known.rpartition(".")[2] == leaf)
    return f"; did you mean {_listed(same_leaf[:4])}?" if same_leaf else _suggestion(key, sorted(keys))
