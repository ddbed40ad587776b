"""Everything that can be wrong with a configuration, found at once and said in words, before a model is loaded."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from spo.config.coefficients import COEFFICIENTS, unused_coefficients
from spo.config.nodes import (
    DIRECTIVES,
    entries,
    first_line,
    listed,
    locate,
    nodes_with_target,
    select,
    suggestion,
)
from spo.errors import ConfigProblems, JudgeError, missing_package
from spo.records import filenames
from spo.resources import conf_dir

HINTS = {
    "model.path": "a Hugging Face folder or hub name",
    "data.path": "the file, folder or hub name of your preference pairs",
    "alpha.target": "the entropy of the policy to aim for, in nats per token",
    "beta.target": "the KL of the policy to the reference to aim for, in nats per sequence",
    "judge.path": "a Hugging Face folder or hub name",
    "judge.model": "the model's name at the endpoint",
    "judge.reward._target_": 'your function, reward(prompts, completions) -> {"reward": [...]}',
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
    "data.micro_batch_tokens": 1,
    "data.group_by_length": 2,
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
    "evaluation.selection_prompts": 0,
    "evaluation.samples_per_prompt": 1,
    "evaluation.max_new_tokens": 1,
    "evaluation.batch_size": 1,
    "evaluation.bootstrap_samples": 1,
    "callbacks.samples.num_prompts": 1,
    "probe.num_prompts": 0,
    "probe.max_new_tokens": 1,
    "evaluation.seed": 0,
    "evaluation.self_bleu_samples": 0,
    "data.limit": 1,
    "data.source.max_responses": 2,
    "reference.batch_tokens": 1,
    "regularizer.refresh_every": 1,
    "regularizer.num_samples": 1,
    "regularizer.batch_size": 1,
    "regularizer.max_new_tokens": 1,
    "scheduler.num_warmup_steps": 0,
    "judge.batch_size": 1,
    "judge.max_length": 2,
    "judge.max_retries": 0,
    "judge.attempts": 1,
    "judge.concurrency": 1,
    "alpha.every": 1,
    "beta.every": 1,
    "speed.max_logits": 1,
}
BOOLEANS = (
    "rerun",
    "model.trust_remote_code",
    "model.gradient_checkpointing",
    "trainer.enable_progress_bar",
    "judge.trust_remote_code",
    "optimizer.fused",
    "sft.fused",
    "speed.packing",
    "speed.share_prompts",
    "speed.completion_only",
    "speed.keep_reference",
    "speed.compile",
)
CHOICES = {"speed.sampler": ("static", "generate")}
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
NEEDED_BY = {"DeepSpeedStrategy": "deepspeed", "TensorBoardLogger": "tensorboard", "HTTPJudge": "openai"}


def check_config(cfg: DictConfig) -> None:
    """Raises :class:`ConfigProblems` with everything that is wrong with ``cfg``."""
    if found := problems(cfg):
        raise ConfigProblems(found)


def problems(cfg: DictConfig) -> list[str]:
    """Missing values, wrong values and impossible combinations, one sentence each.

    Args:
        cfg: a composed configuration, with or without Hydra's own node.
    """
    parts = (missing_and_unresolved, _targets, _values, _trainer, _model, _data, _judge, _evaluation)
    found = [problem for part in parts for problem in part(cfg)]
    return list(dict.fromkeys([*found, *_parts_and_combinations(cfg, found)]))


def warnings(cfg: DictConfig) -> list[str]:
    """What is allowed, and yet probably not meant."""
    loss, regularizer = _build(cfg, "method.loss"), _build(cfg, "regularizer")
    name, found = select(cfg, "method.name"), []
    not_read = unused_coefficients(cfg)
    if "alpha" in not_read and _changed(cfg, "alpha", "data.default_alpha"):
        found.append(f"{name} does not read alpha: what you set it to has no effect")
    if "beta" in not_read and _changed(cfg, "beta", "method.default_beta"):
        found.append(f"nothing reads beta in {name} with this regularizer: what you set it to has no effect")
    for key in (name for name in COEFFICIENTS if name not in not_read):
        every, steps = select(cfg, f"{key}.every"), select(cfg, "trainer.max_steps")
        if every is not None and every > steps:
            found.append(f"{key}.every={every} is more than trainer.max_steps={steps}: {key} is never adjusted")
    if getattr(regularizer, "probe_metric", None) is not None and select(cfg, "probe.num_prompts") == 0:
        found.append(
            "probe.num_prompts=0 leaves the regularizer out of val/loss: it is measured on the probe's samples"
        )
    if getattr(regularizer, "estimator", None) == "k1":
        found.append(
            "regularizer.estimator=k1 measures the KL and does not regularise: its gradient is zero in expectation; "
            "tokenwise, unbiased and k2 have a gradient of the KL"
        )
    if select(cfg, "model.adapter_path") is not None:
        found.append("model.adapter_path brings its own rank, scale and targets: model.lora.* is not read")
    limits = {key: select(cfg, f"data.{key}") for key in ("micro_batch_size", "micro_batch_tokens")}
    if loss is not None and _declares(loss, "uses_batch_statistics"):
        found += [
            f"{name} weighs each pair against those forwarded with it, so data.{key}={limit} changes its gradients"
            for key, limit in limits.items()
            if limit is not None
        ]
    return found


def _changed(cfg: DictConfig, group: str, default_key: str) -> bool:
    default = select(cfg, default_key)
    return select(cfg, group) is not None and select(cfg, f"{group}.value") != (0.1 if default is None else default)


def _declares(loss: Any, name: str) -> bool:
    from spo.losses import PreferenceLoss

    return bool(getattr(loss, name, getattr(PreferenceLoss, name)))  # a loss from outside may declare nothing


def missing_and_unresolved(cfg: DictConfig) -> Iterator[str]:
    for key, node, name in entries(cfg):
        if OmegaConf.is_missing(node, name):
            hint = f": {HINTS[key]}" if key in HINTS else ""
            yield f"{key} has no value{hint} ({key}=...)"
        elif OmegaConf.is_interpolation(node, name):
            try:
                node[name]
            except InterpolationToMissingValueError:
                pass  # what it points to is reported by itself
            except OmegaConfBaseException as error:
                yield f"{key}: {first_line(error)}"


def _targets(cfg: DictConfig) -> Iterator[str]:
    for key, node in nodes_with_target(cfg):
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
    if select(cfg, "model.lora") is not None and importlib.util.find_spec("peft") is None:
        yield f"model.lora: {missing_package('peft')}"


def _arguments(key: str, node: DictConfig, target: Callable[..., Any]) -> Iterator[str]:
    try:
        parameters = dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # some builtins have no signature
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = [str(name) for name in node if name not in DIRECTIVES]
    for name in given:
        if name not in names and not takes_any:
            short = str(node.get("_target_")).rpartition(".")[2]
            yield f"{key}.{name}: {short} has no such parameter{suggestion(name, names)}"
    if not (node.get("_partial_") or node.get("_args_")):
        for name in names:
            if name not in given and parameters[name].default is inspect.Parameter.empty:
                yield f"{key}.{name} has no value ({key}.{name}=...)"
    for name, options in _literals(target).items():
        value = select(node, name)
        if name in given and value is not None and value not in options:
            yield f"{key}.{name}={value}: choose {listed(options)}{suggestion(str(value), options)}"


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
        value = select(cfg, key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            yield f"{key}={value}: must be a whole number"
        elif value < least:
            yield f"{key}={value}: must be at least {least}"
    for key in BOOLEANS:
        value = select(cfg, key)
        if value is not None and not isinstance(value, bool):
            yield f"{key}={value}: must be true or false"
    for key, choices in CHOICES.items():
        value = select(cfg, key)
        if value is not None and value not in choices:
            yield f"{key}={value}: must be {listed(choices)}"
    for key, (holds, words) in _RANGES.items():
        value = select(cfg, key)
        if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool) and holds(value)):
            yield f"{key}={value}: must be {words}"


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "data.splits.selection": (lambda x: 0 < x < 1, "a share of the prompts, above 0 and below 1"),
    "data.splits.test": (lambda x: 0 < x < 1, "a share of the prompts, above 0 and below 1"),
    "evaluation.confidence": (lambda x: 0 < x < 1, "between 0 and 1"),
    "evaluation.temperature": (lambda x: x > 0, "a positive number"),
    **{
        f"callbacks.health.{name}": (lambda x: x > 0, "a positive number, or null for no check")
        for name in ("chosen_fall", "rejected_fall", "p_eos", "repetition", "longer", "shorter", "entropy")
    },
    "judge.margin": (lambda x: x >= 0, "at least 0"),
    "judge.max_unanswered": (lambda x: 0 <= x <= 1, "a share, between 0 and 1"),
    "judge.timeout_s": (lambda x: x > 0, "a positive number of seconds"),
    "judge.requests_per_minute": (lambda x: x > 0, "a positive number, or null for no limit"),
    "judge.input_price": (lambda x: x >= 0, "at least 0, or null"),
    "judge.output_price": (lambda x: x >= 0, "at least 0, or null"),
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
        if name in (select(cfg, "trainer") or {}):
            yield f"trainer.{name} is not for you to set: {instead}"
    precision = str(select(cfg, "trainer.precision"))
    if re.fullmatch(r"(transformer-engine-float)?16(-mixed|-true)?", precision):
        yield (
            f"trainer.precision={precision}: half precision is not supported, its range is too small for summed "
            "log-probabilities; use bf16-mixed or 32-true"
        )
    elif precision not in PRECISIONS:
        yield (
            f"trainer.precision={precision}: choose {listed(PRECISIONS)}; weights in bfloat16 are "
            "model.dtype=bfloat16, for policy and reference alike"
        )
    devices = select(cfg, "trainer.devices")
    if devices == 0 or str(devices) == "0":
        yield "trainer.devices=0: must be a number of devices, a list of them, or auto"
    accelerator, known = str(select(cfg, "trainer.accelerator")), ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
    if accelerator not in known:
        yield f"trainer.accelerator={accelerator}: choose {listed(known)}{suggestion(accelerator, known)}"


def _model(cfg: DictConfig) -> Iterator[str]:
    model = select(cfg, "model")
    if not isinstance(model, DictConfig):
        return
    path, initial = select(cfg, "model.path"), select(cfg, "model.initial")
    lora, adapter = select(cfg, "model.lora"), select(cfg, "model.adapter_path")
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
    dtype = select(cfg, "model.dtype")
    if dtype is not None and not _is_dtype(str(dtype)):
        names = ["float32", "bfloat16", "float64"]
        yield f"model.dtype={dtype}: choose {listed(names)}{suggestion(str(dtype), names)}"
    yield from _table(cfg)


def _table(cfg: DictConfig) -> Iterator[str]:
    if select(cfg, "model.initial._target_") != "spo.models.tabular.build":
        return
    if select(cfg, "data.tokenizer") is None:
        yield "model=tabular needs a data set with a vocabulary of its own: data=enumerable"
        return
    from spo.models.tabular import check_size

    tokenizer, context = _build(cfg, "data.tokenizer"), select(cfg, "model.initial.context")
    if tokenizer is not None and isinstance(context, int):
        try:
            check_size(len(tokenizer), context)
        except ValueError as error:
            yield str(error)


def _judge(cfg: DictConfig) -> Iterator[str]:
    path, dtype = select(cfg, "judge.path"), select(cfg, "judge.dtype")
    if dtype is not None and str(dtype) != "auto" and not _is_dtype(str(dtype)):
        names = ["auto", "float32", "bfloat16", "float64"]
        yield f"judge.dtype={dtype}: choose {listed(names)}{suggestion(str(dtype), names)}"
    if path is None:
        return
    wrong = list(_model_folder("judge.path", str(path), "config.json"))
    yield from wrong
    if not wrong and Path(str(path)).is_dir() and str(select(cfg, "judge._target_")).endswith(".RewardModelJudge"):
        from transformers import PretrainedConfig

        from spo.evaluation.judges.local import one_output

        outputs = PretrainedConfig.from_pretrained(str(path)).num_labels
        if outputs != 1:
            yield f"judge.path={path}: {one_output(outputs)}"


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
    path = select(cfg, "data.path")
    absent = path is not None and not Path(str(path)).expanduser().exists()
    if absent and (_reads_files(cfg) or looks_like_path(str(path))):
        yield f"data.path={path}: there is no such file or folder (seen from {Path.cwd()})"
    truncation = select(cfg, "data.truncation")
    from spo.data.rendering import TRUNCATIONS

    if truncation is not None and truncation not in TRUNCATIONS:
        yield f"data.truncation={truncation}: choose {listed(TRUNCATIONS)}{suggestion(str(truncation), TRUNCATIONS)}"
    on_bad_row, options = select(cfg, "data.on_bad_row"), ("stop", "skip")
    if on_bad_row is not None and on_bad_row not in options:
        yield f"data.on_bad_row={on_bad_row}: choose {listed(options)}"
    shares = [select(cfg, f"data.splits.{name}") for name in ("selection", "test")]
    if all(isinstance(share, int | float) and 0 <= share < 1 for share in shares) and sum(shares) >= 1:
        yield f"data.splits: selection={shares[0]} and test={shares[1]} leave no prompt to train on"
    batch, micro = select(cfg, "data.batch_size"), select(cfg, "data.micro_batch_size")
    if isinstance(batch, int) and isinstance(micro, int) and micro > batch:
        yield f"data.micro_batch_size={micro} exceeds data.batch_size={batch}: it is a part of the batch"
    if str(select(cfg, "data.source._target_")).endswith(".EnumerableSource"):
        symbols, new = select(cfg, "data.source.prompt_symbols"), select(cfg, "data.max_new_tokens")
        length = select(cfg, "data.max_length")
        whole = isinstance(symbols, int) and isinstance(new, int) and length != 1 + symbols + new
        if whole or truncation != "trim_completion":
            yield (
                "data=enumerable: data.max_length and data.truncation follow from the language, so that tokens are "
                "what sampling gives; set data.max_new_tokens and data.source.prompt_symbols instead"
            )


def _evaluation(cfg: DictConfig) -> Iterator[str]:
    against = select(cfg, "evaluation.against")
    if against is None:
        return
    if not isinstance(against, ListConfig):
        yield f"evaluation.against={against}: must be a list, such as [reference,chosen]"
        return
    others = [str(name) for name in against if name != "reference"]
    if others and _no_judge(cfg):
        yield (
            f"evaluation.against: a comparison with {', '.join(others)} takes a judge, and there is none "
            "(judge=none, or judge=gold of data without a reward): choose one, or set evaluation.against=[reference]"
        )
    runs = [name for name in others if name != "chosen"]
    for run in runs:
        if not (Path(run).expanduser() / filenames.SAMPLES).is_file():
            yield (
                f"evaluation.against: {run} is neither reference nor chosen nor the directory of a run with samples "
                f"(no {filenames.SAMPLES}, seen from {Path.cwd()})"
            )
    names = [Path(run).resolve().name for run in runs]
    for name in sorted({name for name in names if names.count(name) > 1 or name in ("reference", "chosen")}):
        yield f"evaluation.against: the name {name} would stand for several opponents: rename a directory"


def _no_judge(cfg: DictConfig) -> bool:
    judge = select(cfg, "judge")
    of_rewards = str(select(cfg, "judge._target_")).endswith(".reward_judge")
    return judge is None or (of_rewards and select(cfg, "judge.reward") is None)


def _reads_files(cfg: DictConfig) -> bool:
    from spo.data import FileSource, HHSource

    try:
        source = locate(str(select(cfg, "data.source._target_")))
    except ImportError:
        return False
    return inspect.isclass(source) and issubclass(source, (FileSource, HHSource))


def _parts_and_combinations(cfg: DictConfig, found: Sequence[str]) -> Iterator[str]:
    said: list[str] = []
    cheap = ["alpha", "beta", "method.loss", "regularizer", "optimizer"]
    if str(select(cfg, "data.source._target_")).startswith("spo."):
        cheap.append("data.source")
    if select(cfg, "judge.reward") is None:  # a reward may be anything, a large model too
        cheap.append("judge")
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
    from spo.regularizers import Regularizer

    if not isinstance(regularizer, Regularizer):
        yield f"regularizer: derive {type(regularizer).__name__} from spo.regularizers.Regularizer"
        return
    method, member = select(cfg, "method.name"), _member("reference", reference)
    scores_pairs, scores_samples = (getattr(reference, name, True) for name in ("scores_pairs", "scores_samples"))
    if regularizer.needs_enumeration and not hasattr(parts.get("data.source"), "language"):
        yield (
            f"regularizer={_member('regularizer', type(regularizer))} sums over every response, which takes a data set "
            "that can be enumerated: choose data=enumerable, or regularizer=global_kl"
        )
    if getattr(parts.get("data.source"), "yields_lists", False) and not _reads_whole(loss):
        yield (
            f"method={method} compares two completions, but the data has lists of more: choose "
            f"{listed(f'method={name}' for name in _list_methods())}, or lists of two "
            "(data.source.max_responses=2 in data=ranked_jsonl, data.source.list_size=2 in data=enumerable)"
        )
    if _declares(loss, "uses_lists") and not hasattr(loss, "of_ranking"):
        yield f"method.loss: {type(loss).__name__} declares uses_lists: derive it from spo.losses.ListLoss"
    if _declares(loss, "uses_reference") and not scores_pairs:
        yield f"method={method} compares with a reference model, but reference={member}: choose reference=frozen"
    if regularizer.needs_reference and not scores_samples:
        yield (
            f"regularizer={_member('regularizer', type(regularizer))} scores sequences with the reference model, which "
            f"reference={member} has not: choose reference=frozen (or adapter_off with model=hf_lora)"
        )
    reads_stored = _declares(loss, "uses_reference") and not regularizer.needs_reference_logits
    if scores_pairs and not scores_samples and not regularizer.needs_reference and not reads_stored:
        yield f"reference={member}: nothing reads the log-probabilities it would compute; choose reference=none"
    if getattr(reference, "stores_logps", False) and scores_samples and not reads_stored:
        yield (
            f"reference={member}: method={method} with regularizer={_member('regularizer', type(regularizer))} does "
            "not read the log-probabilities it would keep; choose reference=frozen"
        )
    if getattr(reference, "needs_adapter", False) and select(cfg, "model.lora") is None:
        yield f"reference={member} needs an adapter to switch off, but model.lora is null: choose model=hf_lora"
    if regularizer.follows_beta and _declares(loss, "uses_beta"):
        yield (
            f"regularizer.weight=beta: {method} reads beta itself, so the regularizer needs a number of its own, "
            "such as regularizer.weight=0.01"
        )
    for name in COEFFICIENTS:
        watched = getattr(parts[name], "watches", None)
        if watched is None or name in unused_coefficients(cfg):
            continue
        chosen = f"{name}={_member(name, type(parts[name]))}"
        if select(cfg, "probe.num_prompts") == 0:
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
        said.append(f"optimizer: {first_line(error)}")


def _reference_class(cfg: DictConfig) -> Any:
    try:
        return locate(str(select(cfg, "reference._target_")))
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

    node = select(cfg, key)
    if not isinstance(node, DictConfig):
        return None
    try:
        return instantiate(node, _convert_="all")
    except OmegaConfBaseException:  # a missing or unresolved value, reported by itself
        return None
    except InstantiationException as error:
        cause = error.__cause__ or error
        if not isinstance(cause, ValueError | TypeError | JudgeError | InstantiationException):
            raise  # no wrong value, but a fault in the code
        if said is not None:
            said.append(first_line(cause) if first_line(cause).startswith(key) else f"{key}: {first_line(cause)}")
        return None
