"""Checks of the callbacks of a run: which ones of Lightning's own can be honored, and which ones can not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo.config.checks.settings import shown
from spo.config.checks.targets import CheckedParts
from spo.config.nodes import select

# Callbacks of Lightning, subclasses included, that would change training or its record behind the back of the run, with
# what to use instead.
UNSUPPORTED: Mapping[str, str] = {
    "StochasticWeightAveraging": "policy/ and the evaluation would not have the averaged weights; leave it out",
    "WeightAveraging": "checkpoints and a resumed run would not have the trained weights; leave it out",
    "GradientAccumulationScheduler": "use data.micro_batch_size: it never changes a gradient",
    "LearningRateFinder": "set optimizer.lr, or search it with hparams_search=optuna",
    "BatchSizeFinder": "set data.micro_batch_size or data.micro_batch_tokens",
    "BaseFinetuning": "it unfreezes by epochs of Lightning, and a run is one of them; use model=hf_lora",
    "ModelPruning": "the optimizer would train weights that the policy does not have; leave it out",
    "BasePredictionWriter": "nothing is predicted; the completions of the evaluation are in samples.jsonl",
    "SpikeDetection": "it skips steps that the record counts; lower optimizer.lr or trainer.gradient_clip_val",
}
MAX_TIME = "write DD:HH:MM:SS, such as 00:12:00:00, or a mapping, such as {hours: 12}"


def members(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return the nodes of the callbacks by name; a callback that is null is off."""
    return {str(name): node for name, node in (cfg.get("callbacks") or {}).items() if node is not None}


def callback_problems(cfg: DictConfig, parts: CheckedParts) -> Iterator[str]:
    """Yield callbacks that cannot be honored, and limits of time that cannot be read.

    Args:
        cfg: Composed configuration.
        parts: Parts of the run that ``cfg`` describes.
    """
    from lightning.pytorch.callbacks import Callback, ProgressBar

    bars, built = [], []
    for name in members(cfg):
        key = f"callbacks.{name}"
        callback = parts.build(key)
        if callback is None:
            continue
        if not isinstance(callback, Callback):
            yield f"{key}: {type(callback).__name__} is not a callback of Lightning"
            continue
        built.append(callback)
        yield from (f"{key}: {problem}" for problem in _problems(callback))
        bars += [name] if isinstance(callback, ProgressBar) else []
    if len(bars) > 1 and select(cfg, "trainer.enable_progress_bar"):
        yield f"callbacks: {' and '.join(bars)} are progress bars; remove all but one (callbacks.{bars[0]}=null)"
    yield from _max_time(cfg)
    yield from _monitor(cfg, parts, built)


def _monitor(cfg: DictConfig, parts: CheckedParts, callbacks: Sequence[Any]) -> Iterator[str]:
    """Yield why the monitored metric cannot choose a checkpoint; others are checked at the first validation."""
    from spo.callbacks import ValidationSamples
    from spo.callbacks.samples import JUDGED_METRICS, PREFIX

    monitor = str(select(cfg, "callbacks.checkpoint.monitor"))
    given, judged = f"callbacks.checkpoint.monitor={monitor}", [f"{PREFIX}{name}" for name in JUDGED_METRICS]
    if select(cfg, "callbacks.checkpoint.top_k") == 0:
        return
    if monitor.startswith("eval/"):
        yield f"{given}: the test split never chooses a step; choose a metric under val/"
    elif monitor in (f"val/{name}" for name in JUDGED_METRICS):
        yield (
            f"{given} comes from the evaluation after training; callbacks=best_win_rate measures {PREFIX}win_rate at "
            "each validation"
        )
    elif monitor.startswith(PREFIX) and not any(isinstance(one, ValidationSamples) for one in callbacks):
        yield f"{given}: no callback logs this metric; use callbacks=samples, or callbacks=best_win_rate"
    elif monitor in judged and parts.judge is None and not parts.has_problem("judge"):
        yield (
            f"{given} takes a judge, and there is none (judge=none, or judge=gold of data without a reward): choose a "
            "member of the group judge, or another metric"
        )


def _problems(callback: Any) -> Iterator[str]:
    from lightning.pytorch import callbacks

    for name, instead in UNSUPPORTED.items():
        if isinstance(callback, getattr(callbacks, name, ())):
            yield f"{type(callback).__name__} is not supported: {instead}"
    # A run is one epoch of Lightning, so what happens at the end of an epoch comes too late.
    if isinstance(callback, callbacks.EarlyStopping) and callback._check_on_train_epoch_end:
        yield "check_on_train_epoch_end=true never stops a run; leave it out, and validations decide"
    if isinstance(callback, callbacks.Timer) and callback._interval == "epoch":
        yield "interval=epoch never stops a run; use interval=step"


def _max_time(cfg: DictConfig) -> Iterator[str]:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import Timer

    value = select(cfg, "trainer.max_time")
    if value is None:
        return
    try:
        plain: Any = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        remaining = Timer(duration=plain).time_remaining()
    except (MisconfigurationException, TypeError, AttributeError):
        yield f"trainer.max_time={shown(value)}: {MAX_TIME}"
        return
    if remaining is not None and remaining <= 0:
        yield f"trainer.max_time={shown(value)}: must be above zero"
