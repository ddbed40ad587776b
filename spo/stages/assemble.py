"""A run put together from its configuration: module, data and trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from spo.callbacks import Interruption, Stop, ValidationSamples
from spo.config.checks.callbacks import members
from spo.config.nodes import first_line
from spo.data.datamodule import PreferenceDataModule
from spo.errors import UserError
from spo.evaluation import EvaluationSettings
from spo.exact import ExactMetrics, World
from spo.forward.speed import Speed
from spo.losses import Loss
from spo.models import Reference
from spo.models.optimizer import make_apart, make_with_names
from spo.models.saving import check_mergeable
from spo.module import AlignmentModule
from spo.objective import Enumeration, Prompts
from spo.objective.learned import PREFIX
from spo.regularizers import Regularizer
from spo.schedules.optimization import warmup_steps
from spo.stages.devices import device_settings, leave_signals_alone
from spo.stages.extra_references import load_extra_references
from spo.stages.from_config import build_loss, build_sharding
from spo.stages.prepare import Prepared
from spo.stages.reference_logps import logps_store, precomputed_logps
from spo.stages.regularizer_prompts import regularizer_prompts
from spo.stages.sharding import shard_while_loading
from spo.watch import ProbeSettings


@dataclass(frozen=True)
class Parts:
    """Objects that a training run consists of.

    Attributes:
        module: Module to train.
        data: Batches of the train and selection splits.
        trainer: Trainer that fits the module to the data.
        exact: Metrics against the optimum, ``None`` for data that cannot be enumerated.
        stop: Callback that knows why training ended before its last step.
    """

    module: AlignmentModule
    data: PreferenceDataModule
    trainer: Trainer
    exact: ExactMetrics | None
    stop: Stop


def assemble(cfg: DictConfig, prepared: Prepared, loggers: list[Any]) -> Parts:
    """Return module, data and trainer of the run that ``cfg`` describes, ready to fit.

    Args:
        cfg: Configuration of the run, resolved.
        prepared: Model, tokenizer and pairs of the run.
        loggers: Loggers of the Trainer.
    """
    shard = shard_while_loading(cfg)
    policy = prepared.spec.policy(prepared.start, seed=cfg.seed, shard=shard)
    check_mergeable(policy)
    reference: Reference = instantiate(cfg.reference)
    exact = build_exact(cfg, prepared)
    enumeration = None if exact is None else Enumeration(exact.world.sequences, len(exact.world.rewards))
    module = build_module(cfg, policy, reference, prepared, enumeration)
    stop = Stop()
    trainer = build_trainer(cfg, loggers, [stop] if exact is None else [stop, exact])
    sampled = _attach_validation_samples(cfg, prepared, trainer)
    if module.needs_reference_model or (sampled and reference.scores_samples):
        reference.attach(lambda: prepared.spec.start(prepared.base, shard=shard))
    reference.use_store(partial(logps_store, cfg, prepared))
    data = build_data(cfg, reference, module, prepared)
    return Parts(module, data, trainer, exact, stop)


def build_exact(cfg: DictConfig, prepared: Prepared) -> ExactMetrics | None:
    """Return metrics by enumeration, or ``None`` for data that cannot be enumerated."""
    if prepared.language is None:
        return None
    world = World.of(prepared.language, prepared.renderer, prepared.pairs.train)
    reference = world.logps(prepared.spec.start(prepared.base))
    return ExactMetrics(world, reference, uniform=cfg.data.source.sampler == "full")


def build_module(
    cfg: DictConfig,
    policy: nn.Module,
    reference: Reference,
    prepared: Prepared,
    enumeration: Enumeration | None = None,
) -> AlignmentModule:
    """Return the LightningModule of the run."""
    loss = build_loss(cfg, policy)
    regularizer: Regularizer = instantiate(cfg.regularizer, _convert_="all")
    probe = ProbeSettings(**cfg.probe) if cfg.probe.num_prompts > 0 else None
    return AlignmentModule(
        policy,
        loss,
        regularizer,
        reference,
        alpha=instantiate(cfg.alpha),
        beta=instantiate(cfg.beta),
        optimizer=build_optimizer(cfg, policy, loss),
        scheduler=build_scheduler(cfg),
        prompts=Prompts(
            [prompt.ids for prompt in prepared.sampling_prompts("train", cfg.data.max_new_tokens)],
            [prompt.ids for prompt in prepared.sampling_prompts("selection", cfg.data.max_new_tokens)],
            prepared.stop_ids,
            prepared.tokenizer.pad_token_id,
            regularizer_prompts(cfg, prepared, regularizer),
        ),
        probe=probe,
        clip_norm=cfg.trainer.gradient_clip_val,
        micro_batch_size=cfg.data.micro_batch_size,
        micro_batch_tokens=cfg.data.micro_batch_tokens,
        log_every_n_steps=cfg.trainer.log_every_n_steps,
        seed=cfg.seed,
        speed=Speed(**cfg.speed),
        enumeration=enumeration,
        extra_references=load_extra_references(cfg, prepared),
        sharding=build_sharding(cfg),
    )


def build_optimizer(
    cfg: DictConfig, policy: nn.Module, loss: Loss[Any] | None = None
) -> Callable[[list[nn.Parameter]], Optimizer]:
    """Return a function from trainable parameters of policy and loss to their optimizer.

    An optimizer with the key ``decay_norm_and_bias`` gets the names of the parameters too.
    """
    make = instantiate(cfg.optimizer, _convert_="all")
    models = {"": policy} | ({PREFIX: loss} if isinstance(loss, nn.Module) else {})
    return (
        partial(make_with_names, make, models) if "decay_norm_and_bias" in cfg.optimizer else partial(make_apart, make)
    )


def build_scheduler(cfg: DictConfig) -> Callable[[Optimizer], LRScheduler]:
    """Return a function from the optimizer to its learning-rate schedule; a share of warm-up becomes a number."""
    settings = cfg.scheduler
    if settings.get("num_warmup_steps") is not None:
        warmup = warmup_steps(settings.num_warmup_steps, cfg.trainer.max_steps)
        settings = OmegaConf.merge(settings, {"num_warmup_steps": warmup})
    return instantiate(settings, _convert_="all")


def build_data(
    cfg: DictConfig, reference: Reference, module: AlignmentModule, prepared: Prepared
) -> PreferenceDataModule:
    """Return the data module, with reference log-probs of its pairs if the loss reads them and they are precomputed."""
    logps = reference.precompute(partial(precomputed_logps, cfg, prepared)) if module.loss.uses_reference else None
    return PreferenceDataModule(
        prepared.pairs.train,
        prepared.pairs.selection,
        batch_size=cfg.data.batch_size,
        micro_batch_size=cfg.data.micro_batch_size,
        micro_batch_tokens=cfg.data.micro_batch_tokens,
        eval_batch_size=cfg.data.eval_batch_size,
        group_by_length=cfg.data.group_by_length,
        seed=cfg.seed,
        num_workers=cfg.data.num_workers,
        pad_token_id=prepared.tokenizer.pad_token_id,
        max_steps=cfg.trainer.max_steps,
        reference_logps=logps,
    )


def build_trainer(cfg: DictConfig, loggers: list[Any], callbacks: list[Callback]) -> Trainer:
    """Return the Trainer of the run.

    The alignment step clips gradients and the data module distributes pairs over ranks, so the Trainer does neither.
    ``trainer.max_steps`` is the length of the run; it includes the limit of ``trainer.max_epochs``.
    """
    settings = {key: value for key, value in cfg.trainer.items() if key not in ("gradient_clip_val", "max_epochs")}
    added = [instantiate(node) for node in members(cfg).values()]
    if not cfg.trainer.enable_progress_bar:
        added = [callback for callback in added if not isinstance(callback, ProgressBar)]
    if build_sharding(cfg) is not None:
        # Sharded models compute in half precision by themselves, wherever they run. Lightning's autocast, which is on
        # in steps and validations alone, would convert a second time.
        settings["precision"] = "32-true"
    make = partial(
        instantiate,
        OmegaConf.create(settings),
        logger=loggers,
        callbacks=[*callbacks, *added, Interruption()],
        strategy=instantiate(cfg.strategy).plugin,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=max(min(cfg.trainer.val_check_interval, cfg.trainer.max_steps), 1),
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        default_root_dir=cfg.paths.run,
        **device_settings(cfg),
        _convert_="all",  # Lightning does not take a mapping of Hydra as its trainer.max_time.
    )
    try:
        return leave_signals_alone(make())
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise UserError(f"trainer or callbacks: Lightning refuses these settings: {first_line(cause)}") from error


def _attach_validation_samples(cfg: DictConfig, prepared: Prepared, trainer: Trainer) -> bool:
    """Connect callbacks that sample at every validation to model and judge; return whether there is one."""
    callbacks = validation_samples(trainer)
    for callback in callbacks:
        settings: EvaluationSettings = instantiate(cfg.evaluation, _convert_="all")
        prompts = prepared.sampling_prompts("selection", settings.max_new_tokens)
        judge = instantiate(cfg.judge, _convert_="all")
        stop_ids, pad_token_id = prepared.stop_ids, prepared.tokenizer.pad_token_id
        callback.attach(prompts, settings, judge, stop_ids, pad_token_id, prepared.renderer.decode)
    return bool(callbacks)


def validation_samples(trainer: Trainer) -> list[ValidationSamples]:
    """Return the callbacks that sample at every validation."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ValidationSamples)]
