"""The reference model: the given weights, or new ones by supervised fine-tuning on the data."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from omegaconf import DictConfig, OmegaConf
from transformers import get_cosine_schedule_with_warmup

from spo.callbacks import Progress
from spo.config.nodes import locate
from spo.data import PreparedPairs, RowError, Source
from spo.data.datamodule import PreferenceDataModule
from spo.data.needs import check_rows, supervised
from spo.data.splits import prepare
from spo.forward.speed import Speed
from spo.guard import StageKeys
from spo.losses import DataNeeds, SFTLoss
from spo.models import ModelSpec, NoReference
from spo.models.saving import save_policy, whole_state_dict
from spo.module import AlignmentModule
from spo.notes import note
from spo.objective import Prompts
from spo.processes import rank, world_size
from spo.records.cache import build_alone, cached, find_cached
from spo.records.digests import SAMPLING_CODE, code_version, model_digest
from spo.regularizers import NoRegularizer
from spo.schedules import Constant
from spo.schedules.optimization import warmup_steps
from spo.stages.devices import device_settings, leave_signals_alone
from spo.stages.from_config import data_key, data_needs, eval_device, make_renderer, model_plugins, rendering_key
from spo.stages.pairs import no_completer

log = logging.getLogger(__name__)
CODE_DEPENDENCIES = (
    *SAMPLING_CODE,
    "data",
    "guard.py",
    "module.py",
    "objective",
    "regularizers/base.py",
    "losses/base.py",
    "losses/declarations.py",
    "losses/rows.py",
    "losses/sft.py",
    "schedules",
    "stages/from_config.py",
    "stages/reference_model.py",
)
"""Files that a cached reference model depends on. A change elsewhere in the package leaves it valid."""


def reference_model(cfg: DictConfig, spec: ModelSpec, source: Source) -> str:
    """Return the folder or hub name of the weights that alignment starts from.

    Args:
        cfg: Configuration of the run, resolved.
        spec: Settings for loading models.
        source: Data for the supervised fine-tuning.
    """
    if spec.initial is None and cfg.sft.max_steps == 0:
        assert spec.path is not None
        return spec.path
    return str(cached(cfg.paths.cache, "sft", _reference_key(cfg, spec), partial(_fine_tune, cfg, spec, source)))


def find_reference(cfg: DictConfig, spec: ModelSpec) -> str | None:
    """Return the folder or hub name of :func:`reference_model` without making one; ``None`` if it has to be made.

    Args:
        cfg: Configuration of the run, resolved.
        spec: Settings for loading models.
    """
    if spec.initial is None and cfg.sft.max_steps == 0:
        return spec.path
    folder = find_cached(cfg.paths.cache, "sft", _reference_key(cfg, spec))
    return None if folder is None else str(folder)


def _reference_key(cfg: DictConfig, spec: ModelSpec) -> dict[str, Any]:
    """Return what a reference model in the cache depends on."""
    return {
        "code": code_version(*CODE_DEPENDENCIES),
        "initial": OmegaConf.to_container(cfg.model.initial, resolve=True) if cfg.model.initial else None,
        "weights": None if spec.path is None else model_digest(spec.path),
        "plugins": model_plugins(cfg),
        "dtype": spec.dtype,
        "sft": OmegaConf.to_container(cfg.sft, resolve=True),
        "data": data_key(cfg, _read_by_sft(cfg)),
        "rendering": rendering_key(cfg),
    }


def initial_model(cfg: DictConfig, spec: ModelSpec) -> str:
    """Return the folder or hub name of the model before supervised fine-tuning, without an adapter.

    Args:
        cfg: Configuration of the run, resolved.
        spec: Settings for loading models.
    """
    if cfg.sft.max_steps == 0 and spec.adapter_path is None:
        note(
            "initial_is_reference",
            "extra_references: without supervised fine-tuning (sft.max_steps=0), the model initial is the reference "
            "itself, and a method of several references reads a single one",
        )
    if spec.path is not None:
        return spec.path
    key = {
        "code": code_version(*CODE_DEPENDENCIES),
        "initial": OmegaConf.to_container(cfg.model.initial, resolve=True),
        "plugins": model_plugins(cfg),
        "dtype": spec.dtype,
    }
    return str(cached(cfg.paths.cache, "initial", key, build_alone(partial(_save_initial, spec))))


def _save_initial(spec: ModelSpec, folder: Path) -> None:
    """Write fresh weights to a folder."""
    assert spec.initial is not None
    model, tokenizer = spec.initial()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    save_policy(model, tokenizer, folder)


def _read_by_sft(cfg: DictConfig) -> tuple[str, ...] | None:
    """Return the arguments of the source on which its supervised rows depend; ``None`` for all."""
    # A subclass inherits the attribute, but may read more, so only what the class itself declares counts.
    declared: tuple[str, ...] | None = vars(locate(str(cfg.data.source._target_))).get("sft_reads")
    return declared


def _fine_tune(cfg: DictConfig, spec: ModelSpec, source: Source, folder: Path | None) -> None:
    """Fine-tune the initial or given weights on the data, with all processes, and write them to the folder if given."""
    if spec.initial is not None:
        model, tokenizer = spec.initial()
        stop_ids: tuple[int, ...] = ()
    else:
        assert spec.path is not None
        model, tokenizer, stop_ids = spec.base(spec.path), spec.tokenizer(spec.path), spec.stop_ids(spec.path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    weights = None
    if cfg.sft.max_steps > 0:
        # A source without rows of its own for this purpose lends the best completion of each preference row.
        rows = source.sft_rows()
        if rows is None:
            if cfg.data.get("on_bad_row") != "skip":
                # A row that the method cannot read must not show only after the training below.
                source.needs = data_needs(cfg)
                check_rows(source.rows(no_completer), source.needs, source.column_name)
            source.needs = DataNeeds.of(SFTLoss())
            rows = supervised(source.rows(no_completer))
        renderer = make_renderer(cfg, tokenizer, source, stop_ids)
        bad_rows: list[RowError] | None = [] if cfg.data.get("on_bad_row") == "skip" else None
        pairs = prepare(rows, renderer, cfg.data.seed, 0.0, 0.0, min_pairs=1, bad_rows=bad_rows)
        weights = _fit_supervised(cfg, model.train(), pairs, tokenizer)
    if folder is not None:
        save_policy(model, tokenizer, folder, weights)


def _fit_supervised(cfg: DictConfig, model: Any, pairs: PreparedPairs, tokenizer: Any) -> dict[str, Any] | None:
    """Train the model on completions, in the module that trains all methods, with the loss of SFT.

    Returns:
        The whole weights in the first process if the model is sharded now, otherwise ``None``.
    """
    sft = cfg.sft
    pad = tokenizer.pad_token_id
    module = AlignmentModule(
        model,
        SFTLoss(),
        NoRegularizer(),
        NoReference(),
        alpha=Constant(1.0),
        beta=Constant(1.0),
        optimizer=partial(
            torch.optim.AdamW, lr=sft.lr, betas=tuple(sft.betas), weight_decay=sft.weight_decay, fused=sft.fused
        ),
        scheduler=partial(
            get_cosine_schedule_with_warmup,
            num_warmup_steps=warmup_steps(sft.num_warmup_steps, sft.max_steps),
            num_training_steps=sft.max_steps,
        ),
        prompts=Prompts([], [], pairs.stop_ids, pad),
        probe=None,
        clip_norm=sft.clip_norm,
        micro_batch_size=None,
        micro_batch_tokens=None,
        log_every_n_steps=20,
        seed=cfg.data.seed,
        speed=Speed(**cfg.speed),
        keys=StageKeys(
            lr="sft.lr",
            clip_norm="sft.clip_norm",
            stage="the supervised fine-tuning",
            memory=("sft.batch_size", "speed.max_logits", "data.max_length"),
        ),
    )
    data = PreferenceDataModule(
        pairs.train,
        [],
        batch_size=sft.batch_size,
        micro_batch_size=None,
        micro_batch_tokens=None,
        eval_batch_size=1,
        group_by_length=None,
        seed=cfg.data.seed,
        num_workers=0,
        pad_token_id=pad,
        max_steps=sft.max_steps,
    )
    if rank() == 0:
        log.info("making the reference model: %d steps of supervised fine-tuning", sft.max_steps)
    trainer = Trainer(
        accelerator=eval_device(cfg).type,
        **_devices(cfg),
        max_steps=sft.max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=cfg.trainer.enable_progress_bar,
        callbacks=[Progress()] if cfg.trainer.enable_progress_bar else [],
        use_distributed_sampler=False,
    )
    leave_signals_alone(trainer).fit(module, datamodule=data)
    weights = whole_state_dict(model, Path(cfg.paths.run))
    if weights is None:
        model.cpu()
    return weights


def _devices(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of the Trainer that say on which devices it trains.

    It trains on the devices of the run, by its strategy or else by DDP. The weights do not depend on their number,
    beyond rounding. Batches with fewer pairs than devices cannot be dealt, so each process then trains by itself on all
    pairs.
    """
    count, size = world_size(), cfg.sft.batch_size
    if count == 1:
        return {"devices": 1}
    if size < count:
        note(
            "sft_not_dealt",
            f"the supervised fine-tuning runs on one device: sft.batch_size={size} is below the {count} devices",
        )
        device = eval_device(cfg)
        return {"devices": 1 if device.index is None else [device.index]}
    strategy = instantiate(cfg.strategy).plugin
    return {**device_settings(cfg), "strategy": "ddp" if isinstance(strategy, DeepSpeedStrategy) else strategy}
