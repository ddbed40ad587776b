"""Checks of single keys that need no code of the run: missing values, types and bounds, keys that others replace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from spo.config.nodes import entries, first_line, listed, nodes_with_target, select
from spo.config.schema import typed_keys
from spo.config.values import violation
from spo.wording import suggestion

HINTS = {
    "model.path": "a Hugging Face folder or hub name",
    "data.path": "the file, folder or hub name of your preference pairs",
    "alpha.target": "the entropy of the policy to aim for, in nats per token",
    "beta.target": "the KL of the policy to the reference to aim for, in nats per sequence",
    "model.initial.tokenizer": "model=tabular needs a data set with a vocabulary of its own: data=enumerable",
    "judge.path": "a Hugging Face folder or hub name",
    "judge.model": "the model's name at the endpoint",
    "judge.reward._target_": 'your function, reward(prompts, completions) -> {"reward": [...]}',
    "alpha.values": "a list of positive numbers, one per optimizer step",
    "beta.values": "a list of positive numbers, one per optimizer step",
}
# Parameters of Lightning's Trainer that follow from other keys, with what to use instead.
DERIVED_TRAINER_KEYS = {
    "accumulate_grad_batches": "use data.micro_batch_size: it never changes a gradient",
    "logger": "choose a member of the group logger",
    "callbacks": "use the group callbacks",
    "strategy": "use the group strategy",
    "plugins": "use the group strategy",
    "min_epochs": "use trainer.max_steps or trainer.max_epochs",
    "min_steps": "use trainer.max_steps or trainer.max_epochs",
    "check_val_every_n_epoch": "use trainer.val_check_interval, in optimizer steps",
    "use_distributed_sampler": "the data module distributes the pairs over devices itself",
    "enable_checkpointing": "use callbacks=none",
    "enable_model_summary": "the start panel shows the parameters",
    "default_root_dir": "use hydra.run.dir",
    "gradient_clip_algorithm": "gradients are clipped by their norm",
    "reload_dataloaders_every_n_epochs": "the data module is read once",
    "fast_dev_run": "use +debug=tiny, a whole run of a few steps",
    "overfit_batches": "use data.limit to train on few pairs",
    "limit_train_batches": "use trainer.max_steps, or data.limit to train on few pairs",
    "limit_val_batches": "use data.splits.selection: a validation covers the whole selection split",
    "limit_test_batches": "use evaluation.num_prompts",
    "limit_predict_batches": "use evaluation.num_prompts",
    "barebones": "it turns the record of the run off; compare speeds with benchmarks/",
    "sync_batchnorm": "language models do not have batch normalization",
    "enable_autolog_hparams": "the record holds the configuration",
    "model_registry": "policy/ in the run directory is the trained model",
}
PROFILERS = ("simple", "advanced", "pytorch", "xla")

# Groups that a run cannot do without, as an experiment file with `GROUP: null` would.
NEEDED_GROUPS = (
    *("paths", "alpha", "beta", "regularizer", "reference", "data", "model", "method", "sft", "optimizer", "scheduler"),
    *("strategy", "speed", "trainer", "evaluation"),
)
# Groups of parts with a name each; a part that is null is off.
NAMED_PARTS = ("callbacks", "logger")
DIRECTIVE_TYPES: tuple[tuple[str, type, str], ...] = (
    ("_target_", str, "the dotted path of a class or function"),
    ("_partial_", bool, "true or false"),
    ("_recursive_", bool, "true or false"),
    ("_args_", ListConfig, "a list"),
)
CONVERSIONS = ("none", "partial", "object", "all")
ASSUMED_STEPS = 1_000_000
"""Number of steps with which a configuration is checked before its data is read."""
ASSUMED_RATE = 1e-5
"""Learning rate with which a configuration is checked where the parameters of its model cannot be counted."""


def missing_and_unresolved(cfg: DictConfig) -> Iterator[str]:
    """Yield keys that still need a value, and references to other keys that lead nowhere."""
    for key, node, name in entries(cfg):
        if OmegaConf.is_missing(node, name):
            hint = f": {HINTS[key]}" if key in HINTS else ""
            yield f"{key} is not set{hint} ({key}=...)"
        elif OmegaConf.is_interpolation(node, name):
            try:
                node[name]
            except InterpolationToMissingValueError:
                pass  # The key it refers to is reported by itself.
            except OmegaConfBaseException as error:
                yield f"{key}: {first_line(error)}"


def with_some_length(cfg: DictConfig) -> DictConfig:
    """Return the configuration, with some number of steps where it follows from trainer.max_epochs and the data."""
    if select(cfg, "trainer.max_steps") is not None or not isinstance(select(cfg, "trainer.max_epochs"), int | float):
        return cfg
    cfg = copy.deepcopy(cfg)
    OmegaConf.update(cfg, "trainer.max_steps", ASSUMED_STEPS)
    return cfg


def with_some_rate(cfg: DictConfig) -> DictConfig:
    """Return the configuration, with some learning rate where it follows from parameters that cannot be counted."""
    if not follows_size(cfg, "optimizer.lr"):
        return cfg
    cfg = copy.deepcopy(cfg)
    OmegaConf.update(cfg, "model.default_lr", ASSUMED_RATE)
    return cfg


def absent_groups(cfg: DictConfig) -> Iterator[str]:
    """Yield groups that a run cannot do without and that are null or were removed, and groups of another shape."""
    for group in NEEDED_GROUPS:
        if not isinstance(select(cfg, group), DictConfig):
            yield f"{group}={shown(select(cfg, group))}: a run needs this group; choose a member ({group}=MEMBER)"
    for group in NAMED_PARTS:
        given = select(cfg, group)
        if given is not None and not isinstance(given, DictConfig):
            yield f"{group}={shown(given)}: must be null, or a mapping of names to parts, each with a _target_"
            continue
        for name in map(str, given or {}):
            part = select(cfg, f"{group}.{name}")
            if part is not None and select(cfg, f"{group}.{name}._target_") is None:
                yield f"{group}.{name}={shown(part)}: must be null, or have a _target_ ({group}.{name}._target_=CLASS)"
    if not isinstance(select(cfg, "probe"), DictConfig):
        yield f"probe={shown(select(cfg, 'probe'))}: must have its keys; probe.num_prompts=0 turns the probe off"
    judge = select(cfg, "judge")
    if judge is not None and not isinstance(judge, DictConfig):
        yield f"judge={shown(judge)}: choose a member (judge=MEMBER)"


def directive_problems(cfg: DictConfig) -> Iterator[str]:
    """Yield keys of Hydra beside a ``_target_``, such as ``_partial_``, whose values Hydra does not accept."""
    for key, node in nodes_with_target(cfg):
        for name, kinds, words in DIRECTIVE_TYPES:
            value = select(node, name)
            if value is not None and not isinstance(value, kinds):
                yield f"{key}.{name}={shown(value)}: must be {words}"
        if str(select(node, "_convert_", "none")).lower() not in CONVERSIONS:
            yield f"{key}._convert_={shown(node['_convert_'])}: choose {listed(CONVERSIONS)}"


def setting_problems(cfg: DictConfig) -> Iterator[str]:
    """Yield values that do not fit the schema, and relations between them that cannot hold."""
    wrong = [key for key, hint in typed_keys().items() if is_given(cfg, key) and violation(select(cfg, key), hint)]
    # A value that refers to another key is wrong because that one is: report it only if there is no such key.
    wrong = [key for key in wrong if not (follows_size(cfg, key) or _follows_length(cfg, key))]
    for key in [key for key in wrong if not _is_reference(cfg, key)] or wrong:
        value = select(cfg, key)
        yield f"{key}={shown(value)}: {violation(value, typed_keys()[key])}"
    yield from _trainer(cfg)
    yield from _relations(cfg)


def is_given(cfg: DictConfig, key: str) -> bool:
    """Return whether a key has a value that can be read; what is missing or unresolved is reported by itself."""
    parent, _, name = key.rpartition(".")
    node = select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig) or name not in node or OmegaConf.is_missing(node, name):
        return False
    try:
        node[name]
    except OmegaConfBaseException:
        return False
    return True


def _is_reference(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    return OmegaConf.is_interpolation(select(cfg, parent) if parent else cfg, name)


def follows_size(cfg: DictConfig, key: str) -> bool:
    """Return whether a key lacks its value because the parameters of the model cannot be counted."""
    model, value = select(cfg, "model"), select(cfg, key)
    unknown = isinstance(model, DictConfig) and "num_parameters" in model and select(cfg, "model.default_lr") is None
    return unknown and value is None and _is_reference(cfg, key)


def _follows_length(cfg: DictConfig, key: str) -> bool:
    """Return whether a key lacks its value because the run does not have a length, which is reported by itself."""
    parent, _, name = key.rpartition(".")
    if select(cfg, key) is not None or not parent or not _is_reference(cfg, key):
        return False
    raw: Any = OmegaConf.to_container(select(cfg, parent))
    return "trainer.max_steps" in str(raw[name])


def shown(value: object) -> str:
    """Return a value as a person writes it on the command line."""
    return "null" if value is None else str(value)


def _trainer(cfg: DictConfig) -> Iterator[str]:
    given = select(cfg, "trainer") or {}
    for name, instead in DERIVED_TRAINER_KEYS.items():
        if name in given:
            yield f"trainer.{name} cannot be set: {instead}"
    profiler = select(cfg, "trainer.profiler")
    if isinstance(profiler, str) and profiler not in PROFILERS:
        yield f"trainer.profiler={profiler}: choose {listed([*PROFILERS, 'null'])}{suggestion(profiler, PROFILERS)}"
    if str(select(cfg, "trainer.devices")) == "0":
        yield "trainer.devices=0: must be a number of devices, a list of them, or auto"
    if "max_steps" in given and select(cfg, "trainer.max_steps") is None and select(cfg, "trainer.max_epochs") is None:
        yield "trainer.max_steps=null: set it, or trainer.max_epochs"


def _relations(cfg: DictConfig) -> Iterator[str]:
    shares = [select(cfg, f"data.splits.{name}") for name in ("selection", "test")]
    if all(isinstance(share, int | float) and 0 <= share < 1 for share in shares) and sum(shares) >= 1:
        yield f"data.splits: selection={shares[0]} and test={shares[1]} leave no prompt to train on"
    if select(cfg, "evaluation.policy") == "best":
        if select(cfg, "callbacks.checkpoint") is None:
            yield "evaluation.policy=best takes checkpoints, and there are none: use callbacks=default"
        elif select(cfg, "callbacks.checkpoint.top_k") == 0:
            yield "evaluation.policy=best takes a best checkpoint, and callbacks.checkpoint.top_k=0: set it to 1"
    batch, micro = select(cfg, "data.batch_size"), select(cfg, "data.micro_batch_size")
    if isinstance(batch, int) and isinstance(micro, int) and micro > batch:
        yield f"data.micro_batch_size={micro} exceeds data.batch_size={batch}: it is a part of the batch"
