"""``spo train``: prepare, align, evaluate, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf

from spo.callbacks.history import HistoryLogger
from spo.callbacks.trackers import LiveTracker
from spo.config.checks import check_config, warnings
from spo.config.choices import pin_choices
from spo.config.compose import fill_empty_groups, pin
from spo.config.iterations import check_command_fits
from spo.config.nodes import extra_references
from spo.data import SPLITS, PreparedPairs
from spo.notes import add_notes, collect_notes, written_notes
from spo.pages.panels import result_panel, start_panel
from spo.pages.run_page import render_report
from spo.pages.start_facts import start_facts
from spo.processes import first_decides, gather_objects, is_first_process, peer_loss_in_words, world_size
from spo.records import filenames
from spo.records.digests import digest, model_digest
from spo.records.files import write_jsonl
from spo.records.iteration import is_iteration
from spo.records.leftovers import remove_abandoned_builds
from spo.records.run import read_result
from spo.rounds.alarms import alarms_of_run
from spo.runs.checkpoints import last_checkpoint
from spo.runs.claim import Status, claim, finish
from spo.runs.processes import sweep_dir
from spo.runs.provenance import record_continuation, record_inputs
from spo.runs.resume import changed_config, resumed_config
from spo.secrets import remember_secrets
from spo.stages.assemble import Parts, assemble, validation_samples
from spo.stages.checkpointing import checkpoint_folder, fit, prepare_checkpoints
from spo.stages.description import describe, title
from spo.stages.devices import join_processes, refuse_few_pairs
from spo.stages.evaluate import evaluate_run, refuse_nonfinite
from spo.stages.evaluated_models import load_models
from spo.stages.extra_references import reference_paths
from spo.stages.from_config import resolve_values
from spo.stages.length import with_length
from spo.stages.prepare import Prepared, prepare_run
from spo.stages.quiet import quiet_libraries
from spo.stages.saved import release_models, save_training
from spo.stages.trained import Start, check_pairs
from spo.tracking import Tracker
from spo.tracking.guard import make_guarded, writable_home


def train(cfg: DictConfig, *, resumed: bool = False, checked: bool = False) -> dict[str, float]:
    """Run the job that ``cfg`` describes in its run directory, or read the result that is there already.

    Args:
        cfg: Configuration of the run.
        resumed: Continue the run in the directory even if another version of the code started it.
        checked: Skip the checks of the configuration, because the caller has made them.

    Returns:
        The final metrics.

    Raises:
        UserError: The configuration is impossible, or the run directory belongs to another run.
        PeerLostError: Another process of the run has ended.
    """
    quiet_libraries()
    check_command_fits("train", [cfg])
    join_processes(cfg)
    fill_empty_groups(cfg)
    remember_secrets(OmegaConf.to_container(cfg, resolve=False))
    pin(cfg)
    pin_choices(cfg)
    if not checked:
        first_decides(partial(check_config, cfg))
    run_dir = Path(cfg.paths.run)
    with (
        claim(run_dir, cfg, resumed=resumed) as status,
        peer_loss_in_words(),
        writable_home(run_dir),
        collect_notes() as notes,
    ):
        if status is Status.FINISHED:
            return _show_finished(run_dir) if is_first_process() else {}
        return _run(cfg, run_dir, notes, resume=status is Status.UNFINISHED)


def resume(
    run_dir: Path, overrides: Sequence[str], allow: Sequence[str] = (), config_dir: str | Path | None = None
) -> dict[str, float]:
    """Resume the run in ``run_dir`` from its last checkpoint, with its own configuration.

    Args:
        run_dir: Run directory.
        overrides: Overrides that change time or cost and no result.
        allow: Targets, modules and paths of the configuration that may be used although it came with the directory.
        config_dir: Folder with further members of the groups.

    Returns:
        The final metrics.
    """
    changes = run_dir, overrides, allow, config_dir
    join_processes(changed_config(*changes))
    return train(first_decides(partial(resumed_config, *changes)), resumed=True)


def _run(composed: DictConfig, run_dir: Path, notes: Mapping[str, float], resume: bool) -> dict[str, float]:
    started = perf_counter()
    # Resolved only now, because the record has the names of environment variables and not the secrets in them.
    cfg = resolve_values(composed)
    seed_everything(cfg.seed, workers=True, verbose=False)
    point = first_decides(partial(last_checkpoint, run_dir, checkpoint_folder(cfg))) if resume else None
    if point is not None:
        record_continuation(run_dir, cfg, max(point.step, 0))
    first_decides(partial(remove_abandoned_builds, Path(cfg.paths.cache).absolute()))
    prepared = prepare_run(cfg)
    first_decides(partial(refuse_few_pairs, prepared.pairs, world_size()))
    cfg = with_length(composed, len(prepared.pairs.train))
    _record_inputs(cfg, prepared, run_dir, max(point.step, 0) if point else 0)
    prepared_at = perf_counter()

    step, history = (None, None) if point is None else (point.step, point.history)
    record = HistoryLogger(run_dir / filenames.HISTORY, step, history, cfg.trainer.log_every_n_steps)
    made = (make_guarded(str(name), partial(instantiate, node)) for name, node in cfg.logger.items())
    loggers = [logger for logger in made if logger is not None]
    trackers = [logger for logger in loggers if isinstance(logger, Tracker)]
    parts = assemble(cfg, prepared, [record, *loggers])
    module, trainer = parts.module, parts.trainer
    prepare_checkpoints(cfg, trainer, run_dir, prepared)
    check_pairs(prepared.pairs.train, module.loss)
    start = Start(module.policy)
    if trainer.is_global_zero:
        _show_start(cfg, prepared, parts)
    with ExitStack() as stack:
        for tracker in trackers:
            stack.callback(tracker.close)  # a failed job must not leave its run open for the next job
            if is_first_process():
                tracker.describe(describe(cfg, run_dir, recorded=record.resumed))
        fit(parts, None if point is None else point.path)
        trained_at = perf_counter()
        saved = save_training(cfg, prepared, run_dir, parts, start, record)
        judge = next((callback.judge for callback in validation_samples(trainer)), None)
        release_models(module, trainer)
        models = load_models(cfg, prepared, run_dir)
        gap = None if saved is None else saved.policy.gap(models.policy, run_dir / filenames.POLICY)
        evaluation = evaluate_run(cfg, prepared, run_dir, judge, models)
        for written in gather_objects(written_notes()):  # A share of the data may hold what a note is about.
            add_notes(written)
        if saved is None:
            return {}
        better = {key: value for key, value in evaluation.metrics.items() if key in record.latest}
        for logger in trainer.loggers if saved.step == trainer.global_step else ():
            logger.log_metrics(better, step=trainer.global_step)  # each curve ends in the number of metrics.json
            logger.save()

        times = {"prepare_s": prepared_at - started}
        if (earlier := module.trained.earlier_seconds) is not None:  # A resumed run trained before as well.
            times["train_s"] = earlier + trained_at - prepared_at
        times |= {"evaluate_s": perf_counter() - trained_at, "total_s": perf_counter() - started}
        metrics = {
            **(record.latest if saved.step == trainer.global_step else record.latest_with_validation_of(saved.step)),
            **({"policy/step": float(saved.step)} if cfg.evaluation.get("policy") == "best" else {}),
            **evaluation.metrics,
            **saved.budget,
            **({} if gap is None else {"policy/saved_gap": gap}),
            **{f"data/pairs_{key}": float(count) for key, count in prepared.pairs.reported_counts.items()},
            **notes,
            **{f"time/{key}": value for key, value in times.items()},
        }
        evaluation.write_samples(run_dir)
        refuse_nonfinite(metrics)
        finish(run_dir, metrics)
        render_report(run_dir)
        # The record is complete before a tracker, which may fail or hang, reads it.
        alarms = alarms_of_run(run_dir)
        for tracker in trackers:
            if isinstance(tracker, LiveTracker):
                for words in alarms:
                    tracker.alert(f"iteration: {words.partition(':')[0]}", words, saved.step)
            tracker.conclude(metrics, evaluation.samples)
        if notes.keys() - metrics.keys():
            metrics |= notes
            finish(run_dir, metrics)
            render_report(run_dir)
    result_panel(metrics, evaluation.samples, run_dir)
    return metrics


def _show_finished(run_dir: Path) -> dict[str, float]:
    """Show the result of a finished run, in one line within a sweep or an iteration, and return its metrics."""
    metrics, samples = read_result(run_dir)
    if not (run_dir / filenames.REPORT).is_file():
        render_report(run_dir)
    if sweep_dir() is not None or any(map(is_iteration, run_dir.parents[:2])):
        print(f"finished before: {run_dir}")
    else:
        result_panel(metrics, samples, run_dir)
    return metrics


def _show_start(cfg: DictConfig, prepared: Prepared, parts: Parts) -> None:
    notes = [*warnings(cfg), *prepared.pairs.warnings]
    if cfg.evaluation.selection_prompts > 0 and not prepared.prompts["selection"]:
        notes.append("the selection split does not have a prompt to sample from: there will be no val/win_rate")
    start_panel(
        title(cfg),
        start_facts(cfg, parts.module, prepared.pairs, parts.trainer, parts.exact, extra_references(cfg)),
        notes,
    )


def data_digests(pairs: PreparedPairs) -> dict[str, str]:
    """Return the digest of the pairs, which all methods share, and that of what the loss reads if it reads more."""
    read = digest({split: [pair.identity() for pair in getattr(pairs, split)] for split in SPLITS})
    rows = digest({split: [pair.identity() for pair in pairs.rows[split]] for split in SPLITS})
    return {"pairs_sha256": rows} | ({} if read == rows else {"loss_rows_sha256": read})


def _record_inputs(cfg: DictConfig, prepared: Prepared, run_dir: Path, step: int) -> None:
    """Record the digests of the references and the pairs, and the rows that were skipped.

    Args:
        cfg: Configuration of the run, resolved.
        prepared: Model and pairs.
        run_dir: Run directory.
        step: Optimizer step of the checkpoint that the run continues from, 0 where it starts.
    """
    if not is_first_process():
        return
    inputs: dict[str, Any] = {"reference_sha256": model_digest(prepared.base), **data_digests(prepared.pairs)}
    further = {name: model_digest(path) for name, path in reference_paths(cfg, prepared).items()}
    record_inputs(run_dir, inputs | ({"extra_references_sha256": further} if further else {}), step)
    if bad := prepared.bad_rows:
        rows = [{"where": error.where, "column": error.column, "reason": error.reason} for error in bad]
        write_jsonl(run_dir / filenames.BAD_ROWS, rows)
        skipped = "1 bad row was skipped; it is" if len(rows) == 1 else f"{len(rows):,} bad rows were skipped; they are"
        prepared.pairs.warnings.append(f"{skipped} listed in {filenames.BAD_ROWS}")
