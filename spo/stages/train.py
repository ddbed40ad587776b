"""The main job, top to bottom: prepare, align, evaluate, report."""

from __future__ import annotations

import dataclasses
import logging
import sys
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import nn

from spo.callbacks import ValidationSamples
from spo.callbacks.history import HistoryLogger
from spo.config.checks import check_config, warnings
from spo.config.coefficients import COEFFICIENTS, unused_coefficients
from spo.data import SPLITS
from spo.data.datamodule import PreferenceDataModule
from spo.evaluation import EvaluationSettings
from spo.exact import ExactMetrics, World, entropy
from spo.forward.speed import Speed
from spo.losses import Loss
from spo.metrics.catalogue import unit
from spo.models import Reference
from spo.models.policy import save_policy, whole_state_dict
from spo.module import AlignmentModule
from spo.objective import Enumeration, Prompts
from spo.pages.panels import result_panel, start_panel
from spo.pages.rows import show_rows
from spo.pages.run_page import render_report
from spo.records import filenames
from spo.records.digests import digest, model_digest
from spo.records.files import read_json, read_jsonl, write_json, write_jsonl
from spo.regularizers import Regularizer
from spo.runs.claim import Status, claim, finish
from spo.runs.processes import is_first_process, sweep_dir
from spo.runs.provenance import record_continuation, record_inputs
from spo.runs.resume import resumed_config
from spo.schedules import Controller, Schedule
from spo.stages.evaluate import evaluate_run
from spo.stages.prepare import Prepared, prepare_run
from spo.stages.quiet import quiet_libraries
from spo.stages.reference_logps import logps_store, precomputed_logps
from spo.tracking import RunDescription, Tracker
from spo.watch import ProbeSettings

log = logging.getLogger(__name__)
COUNTS = ("read", "used", "dropped", "truncated")


def train(cfg: DictConfig, *, resumed: bool = False, checked: bool = False) -> dict[str, float]:
    """Runs the job that ``cfg`` describes in its run directory, or reads the result that is there already.

    Args:
        cfg: Configuration of the run.
        resumed: Continue the run in the directory even if another version of the code started it.
        checked: Skip the checks of the configuration, because the caller has made them.

    Returns:
        The final metrics.

    Raises:
        UserError: the configuration is impossible, or the run directory holds another run.
    """
    quiet_libraries()
    if not checked:
        check_config(cfg)
    run_dir = Path(cfg.paths.run)
    with claim(run_dir, cfg, resumed=resumed) as status:
        if status is Status.FINISHED:
            metrics, samples = read_result(run_dir)
            if sweep_dir() is not None:
                print(f"finished before: {run_dir}")
            else:
                result_panel(metrics, samples, run_dir)
            return metrics
        # Resolved only now: the record keeps the names of environment variables, not the secrets they hold.
        values = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
        assert isinstance(values, DictConfig)
        return _run(values, run_dir, resume=status is Status.UNFINISHED)


def resume(run_dir: Path, overrides: list[str]) -> dict[str, float]:
    """Goes on with the run in ``run_dir`` from its last checkpoint, with its own configuration."""
    return train(resumed_config(run_dir, overrides), resumed=True)


def _run(cfg: DictConfig, run_dir: Path, resume: bool) -> dict[str, float]:
    started = perf_counter()
    seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoint, step = last_checkpoint(run_dir) if resume else (None, None)
    if step is not None:
        record_continuation(run_dir, max(step, 0))
    prepared = prepare_run(cfg)
    _record_inputs(prepared, run_dir, max(step or 0, 0))
    prepared_at = perf_counter()

    record = HistoryLogger(run_dir / filenames.HISTORY, resume_at=step)
    loggers = [instantiate(node) for node in cfg.logger.values()]
    trackers = [logger for logger in loggers if isinstance(logger, Tracker)]
    parts = assemble(cfg, prepared, [record, *loggers])
    module, trainer = parts.module, parts.trainer
    if trainer.is_global_zero:
        notes = [*warnings(cfg), *prepared.pairs.warnings]
        if cfg.evaluation.selection_prompts > 0 and not prepared.prompts["selection"]:
            notes.append("the selection split has no prompt to sample from: there will be no val/win_rate")
        title = ": ".join(filter(None, [method_name(cfg), cfg.method.get("title")]))
        start_panel(title, facts(cfg, module, prepared, trainer, parts.exact), notes)
    with ExitStack() as stack:
        for tracker in trackers:
            stack.callback(tracker.close)  # a job that fails must not leave its run open for the next one
            tracker.describe(describe(cfg, run_dir, record))
        trainer.fit(module, datamodule=parts.data, ckpt_path=checkpoint, weights_only=True)
        trained_at = perf_counter()
        weights = whole_state_dict(module.policy)
        if not trainer.is_global_zero:
            return {}
        module.reference.to(torch.device("cpu"))  # makes room: the evaluation loads what was saved
        write_json(run_dir / filenames.COEFFICIENTS, {n: getattr(module, n)(trainer.global_step) for n in COEFFICIENTS})
        save_policy(module.policy, prepared.tokenizer, run_dir / filenames.POLICY, weights)
        judge = next((one.judge for one in _sampling(trainer)), None)
        evaluation = evaluate_run(cfg, prepared, run_dir, judge)
        better = {key: value for key, value in evaluation.metrics.items() if key in record.latest}
        for logger in trainer.loggers:  # a curve ends in the number that metrics.json has
            logger.log_metrics(better, step=trainer.global_step)
            logger.save()
        times = {"prepare_s": prepared_at - started, "train_s": trained_at - prepared_at}
        times |= {"evaluate_s": perf_counter() - trained_at, "total_s": perf_counter() - started}
        metrics = {
            **record.latest,
            **evaluation.metrics,
            **{f"data/pairs_{key}": float(prepared.pairs.counts[key]) for key in COUNTS},
            **{f"time/{key}": value for key, value in times.items()},
        }
        evaluation.write_samples(run_dir)
        for tracker in trackers:
            tracker.conclude(metrics, evaluation.samples)
    finish(run_dir, metrics)
    render_report(run_dir)
    result_panel(metrics, evaluation.samples, run_dir)
    return metrics


# --- the parts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What a run is put together from. ``exact`` measures against the optimum where the language can be enumerated."""

    module: AlignmentModule
    data: PreferenceDataModule
    trainer: Trainer
    exact: ExactMetrics | None


def assemble(cfg: DictConfig, prepared: Prepared, loggers: list[Any]) -> Parts:
    """Module, data and trainer of the run that ``cfg`` describes, ready to fit."""
    policy = prepared.spec.policy(prepared.base, seed=cfg.seed)
    reference: Reference = instantiate(cfg.reference)
    exact = build_exact(cfg, prepared)
    enumeration = None if exact is None else Enumeration(exact.world.sequences, len(exact.world.rewards))
    module = build_module(cfg, policy, reference, prepared, enumeration)
    trainer = build_trainer(cfg, loggers, [] if exact is None else [exact])
    sampled = _attach_samples(cfg, prepared, trainer)
    if module.needs_reference_model or (sampled and reference.scores_samples):
        reference.attach(lambda: prepared.spec.start(prepared.base))
    reference.use_store(partial(logps_store, cfg, prepared))
    data = build_data(cfg, reference, module, prepared)
    return Parts(module, data, trainer, exact)


def build_exact(cfg: DictConfig, prepared: Prepared) -> ExactMetrics | None:
    """Metrics by enumeration, for data whose every response is known."""
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
    """The LightningModule of the run."""
    loss: Loss[Any] = instantiate(cfg.method.loss, _convert_="all")
    regularizer: Regularizer = instantiate(cfg.regularizer, _convert_="all")
    probe = ProbeSettings(**cfg.probe) if cfg.probe.num_prompts > 0 else None
    tokenizer = prepared.tokenizer
    return AlignmentModule(
        policy,
        loss,
        regularizer,
        reference,
        alpha=instantiate(cfg.alpha),
        beta=instantiate(cfg.beta),
        optimizer=instantiate(cfg.optimizer, _convert_="all"),
        scheduler=instantiate(cfg.scheduler, _convert_="all"),
        prompts=Prompts(
            [prompt.ids for prompt in prepared.sampling_prompts("train", cfg.data.max_new_tokens)],
            [prompt.ids for prompt in prepared.sampling_prompts("selection", cfg.data.max_new_tokens)],
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        ),
        probe=probe,
        clip_norm=cfg.trainer.gradient_clip_val,
        micro_batch_size=cfg.data.micro_batch_size,
        micro_batch_tokens=cfg.data.micro_batch_tokens,
        log_every_n_steps=cfg.trainer.log_every_n_steps,
        seed=cfg.seed,
        speed=Speed(**cfg.speed),
        enumeration=enumeration,
    )


def build_data(
    cfg: DictConfig, reference: Reference, module: AlignmentModule, prepared: Prepared
) -> PreferenceDataModule:
    """The data module, with the reference log-probs of its pairs where the reference is precomputed and read."""
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
    """Lightning's Trainer; what the alignment step and the data module do themselves is taken out of its hands."""
    settings = {key: value for key, value in cfg.trainer.items() if key != "gradient_clip_val"}
    shown = cfg.trainer.enable_progress_bar
    return instantiate(
        OmegaConf.create(settings),
        logger=loggers,
        callbacks=callbacks
        + [instantiate(node) for name, node in cfg.callbacks.items() if shown or name != "progress"],
        strategy=instantiate(cfg.strategy).plugin,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=max(min(cfg.trainer.val_check_interval, cfg.trainer.max_steps), 1),
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing="checkpoint" in cfg.callbacks,
        default_root_dir=cfg.paths.run,
    )


def _attach_samples(cfg: DictConfig, prepared: Prepared, trainer: Trainer) -> bool:
    """Gives what it needs to the callback that samples at every validation; whether there is one."""
    callbacks = _sampling(trainer)
    for callback in callbacks:
        settings: EvaluationSettings = instantiate(cfg.evaluation, _convert_="all")
        prompts = prepared.sampling_prompts("selection", settings.max_new_tokens)
        judge = instantiate(cfg.judge, _convert_="all")
        callback.attach(prompts, settings, judge, prepared.tokenizer, prepared.renderer.decode)
    return bool(callbacks)


def _sampling(trainer: Trainer) -> list[ValidationSamples]:
    return [one for one in trainer.callbacks if isinstance(one, ValidationSamples)]  # type: ignore[attr-defined]


def describe(cfg: DictConfig, run_dir: Path, record: HistoryLogger) -> RunDescription:
    """The run as dashboards list it: its name, and one tag for each part of it."""
    parts = [method_name(cfg), *coefficients(cfg), f"seed-{cfg.seed}"]
    config = OmegaConf.to_container(OmegaConf.load(run_dir / filenames.CONFIG))
    provenance = read_json(run_dir / filenames.PROVENANCE)
    return RunDescription(
        name="_".join(parts),
        group=run_dir.parent.name,
        job_type=method_name(cfg),
        tags=[*parts, *cfg.tags],
        config={**config, "provenance": provenance},  # type: ignore[dict-item]
        directory=run_dir,
        recorded=record.resumed,
    )


def method_name(cfg: DictConfig) -> str:
    """``method.name``, or the name of the loss where the yaml of a method from outside gives none."""
    return cfg.method.get("name") or cfg.method.loss._target_.rpartition(".")[2].removesuffix("Loss").lower()


def coefficients(cfg: DictConfig) -> list[str]:
    """The coefficients that the composition reads, such as ``alpha-0.05`` and ``beta-0.03``."""
    not_read = unused_coefficients(cfg)
    return [f"{name}-{instantiate(cfg[name])}" for name in COEFFICIENTS if name not in not_read]


def facts(
    cfg: DictConfig, module: AlignmentModule, prepared: Prepared, trainer: Trainer, exact: ExactMetrics | None
) -> dict[str, str]:
    """What follows from the configuration and is worth knowing before waiting for the result."""
    parameters = list(module.policy.parameters())
    total, trainable = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    counts, train_pairs = prepared.pairs.counts, prepared.pairs.train
    tokens = sum(len(pair.prompt_ids) * len(pair.completions) + sum(map(len, pair.completions)) for pair in train_pairs)
    size = min(cfg.data.batch_size, len(train_pairs))
    return {
        "policy": f"{total:,} parameters" + ("" if trainable == total else f", {trainable:,} of them trained"),
        "reference": module.reference.describe(),
        "pairs": ", ".join(f"{counts[key]} {key}" for key in COUNTS),
        "splits": f"{counts['train']} train, {counts['selection']} selection, {counts['test']} test pairs",
        "a step": f"{size} pairs, about {tokens * size // len(train_pairs):,} tokens",
        "steps": f"{cfg.trainer.max_steps}, {cfg.trainer.max_steps * size / len(train_pairs):.1f} epochs",
        "alpha": _schedule_words(module.alpha) if module.loss.uses_alpha else "not read",
        "beta": _beta_words(module),
        "devices": f"{trainer.num_devices * trainer.num_nodes} x {trainer.strategy.root_device.type}",
        "run directory": str(cfg.paths.run),
    } | ({} if exact is None else {"optimum": _optimum_words(module, exact)})


def _optimum_words(module: AlignmentModule, exact: ExactMetrics) -> str:
    optimum = exact.optimum(module)
    if optimum is None:
        return "none: the data and the objective do not single one policy out"
    stated = "as the loss states it" if optimum.found == "closed form" else "found numerically"
    return f"{stated}, entropy {float(entropy(optimum.logps).mean()):.4g} nats per response"


def _beta_words(module: AlignmentModule) -> str:
    regularizer, words = module.regularizer, _schedule_words(module.beta)
    if module.loss.uses_beta:
        extra = f"; regularizer.weight {regularizer.weight:g}" if regularizer.adds_term else ""
        return f"{words}, of the loss{extra}"
    return f"{words}, weight of the regularizer" if regularizer.follows_beta else "not read"


def _schedule_words(schedule: Schedule) -> str:
    if not isinstance(schedule, Controller):
        return f"{schedule(0):g}"
    return f"{schedule(0):g}, adjusted to {schedule.watches} {schedule.target:g} {unit(schedule.watches)}"


# --- files of the run directory ------------------------------------------------------------------------------------


def read_result(run_dir: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics and samples of a finished run."""
    return read_json(run_dir / filenames.METRICS), read_jsonl(run_dir / filenames.SAMPLES)


def _record_inputs(prepared: Prepared, run_dir: Path, step: int) -> None:
    """Record the digests of the reference model and the pairs, and the rows that were skipped.

    Args:
        prepared: Model and pairs.
        run_dir: Run directory.
        step: Optimizer step of the checkpoint that the run continues from, 0 where it starts.
    """
    if not is_first_process():
        return
    pairs = {split: [dataclasses.astuple(pair) for pair in getattr(prepared.pairs, split)] for split in SPLITS}
    inputs = {"reference_sha256": model_digest(prepared.base), "pairs_sha256": digest(pairs)}
    record_inputs(run_dir, inputs, step)
    if bad := prepared.bad_rows:
        rows = [{"where": error.where, "column": error.column, "reason": error.reason} for error in bad]
        write_jsonl(run_dir / filenames.BAD_ROWS, rows)
        prepared.pairs.warnings.append(f"{len(rows)} bad rows were skipped; they are listed in {filenames.BAD_ROWS}")


def last_checkpoint(run_dir: Path) -> tuple[str | None, int]:
    """The newest checkpoint that can be read, and its step.

    Returns:
        Path and step; ``None`` and -1 where the run has to begin again, since none of its rows stays.
    """
    for name in (filenames.LAST_CHECKPOINT, filenames.BEST_CHECKPOINT):
        path = run_dir / filenames.CHECKPOINTS / name
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:  # torch itself does not check the sums
                intact = archive.testzip() is None
            if intact:
                return str(path), int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])
        except Exception:  # whatever a file that is cut leads to
            pass
        if is_first_process():
            print(f"spo: {path} is damaged: skipped", file=sys.stderr)
    return None, -1


def inspect(cfg: DictConfig, limit: int) -> None:
    """Prints the first rows of the training split as tokens, masks and text."""
    values = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(values, DictConfig)
    prepared = prepare_run(values)
    show_rows(prepared.pairs.train, prepared.tokenizer, limit, prepared.pairs.counts)
