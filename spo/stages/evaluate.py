"""Evaluation of a finished run: the end of ``spo train``, and ``spo evaluate``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress, TimeElapsedColumn

from spo.config.checks import check_config
from spo.config.compose import job_name
from spo.config.nodes import further_kl_models
from spo.data import EvalPrompt
from spo.data.rows import Split
from spo.errors import COPY_RUN, UserError, memory_for, placed_by
from spo.evaluation import EvaluationSettings
from spo.evaluation.assess import Evaluation, assess, draw_both
from spo.evaluation.cached_completions import cached_completions
from spo.evaluation.completions import Draws
from spo.evaluation.judges import Judge
from spo.evaluation.judges.together import judging
from spo.evaluation.opponents import find_opponents
from spo.evaluation.pair_metrics import pair_metrics
from spo.metrics.catalogue import INTERVAL_ENDS, REFERENCE
from spo.pages.panels import result_panel
from spo.processes import deal, first_decides, place, rank
from spo.records import filenames
from spo.records.digests import model_digest
from spo.records.files import write_json, write_jsonl, write_text
from spo.records.policy import saved_policy, verify_policy
from spo.runs.saved_config import load_config, refuse_redacted, resolved
from spo.stages.devices import join_processes
from spo.stages.evaluated_models import Models, build_scoring, load_models
from spo.stages.evaluation_config import trusted_evaluation
from spo.stages.from_config import (
    eval_device,
    model_plugins,
    resolve_values,
    sharded_dtype,
    training_numerics,
)
from spo.stages.prepare import Prepared, prepare_run
from spo.stages.quiet import quiet_libraries

SELECTION_METRICS = ("win_rate", *(f"win_rate{end}" for end in INTERVAL_ENDS), "reward", "kl", "entropy")
"""Metrics of the final evaluation that are measured on the selection split too, for choosing between settings."""


def evaluate_command(
    run_dir: Path, overrides: Sequence[str], allow: Sequence[str] = (), config_dir: str | Path | None = None
) -> dict[str, float]:
    """Evaluate the policy of a finished run again, as before or with other data or settings.

    The record of the run stays as it is. The result goes to ``evaluations/NAME`` inside the run directory, where NAME
    follows from the overrides. The processes of a run share the work, and the first one writes.

    Args:
        run_dir: Directory of a run that has written its policy.
        overrides: Overrides of the groups ``data``, ``evaluation`` and ``judge``, and of the device.
        allow: Targets, modules and paths of the configuration that may be used although it came with the directory.
        config_dir: Folder with further members of the groups. What its files name may be used too.

    Returns:
        The metrics; empty on other processes than the first.

    Raises:
        UserError: The run does not have a policy, an override is of another group, or the configuration asks for
            something that the caller must allow.
    """
    quiet_libraries()
    own = load_config(run_dir)
    saved_policy(run_dir)
    cfg = trusted_evaluation(own, run_dir, overrides, allow, config_dir)
    refuse_redacted(cfg)
    check_config(cfg)
    values = resolve_values(cfg)
    if place().world_size > 1:
        join_processes(values)
    first_decides(partial(verify_policy, run_dir))
    prepared = prepare_run(values, model_from=resolve_values(own))
    evaluation = evaluate_run(values, prepared, run_dir)
    if rank() > 0:
        return {}
    folder = run_dir / filenames.EVALUATIONS / job_name(list(overrides))
    refuse_nonfinite(evaluation.metrics)
    with placed_by(COPY_RUN, run_dir):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / filenames.CONFIG, OmegaConf.to_yaml(OmegaConf.create(resolved(cfg))))
        evaluation.write_samples(folder)
        write_json(folder / filenames.METRICS, evaluation.metrics)
    result_panel(evaluation.metrics, evaluation.samples, folder)
    return evaluation.metrics


@dataclass(frozen=True)
class RunEvaluation:
    """Result of an evaluation, which the first process has; that of another process is empty.

    Attributes:
        metrics: Metrics of both splits under flat keys.
        samples: Samples of the test split.
        selection_samples: Samples of the selection split, empty if it was not evaluated.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    selection_samples: list[dict[str, Any]] = field(default_factory=list)

    def write_samples(self, folder: Path) -> None:
        """Write ``samples.jsonl`` and, if the selection split was evaluated, ``samples.selection.jsonl``."""
        for name, rows in ((filenames.SAMPLES, self.samples), (filenames.SELECTION_SAMPLES, self.selection_samples)):
            if rows:
                write_jsonl(folder / name, rows)


def evaluate_run(
    cfg: DictConfig, prepared: Prepared, run_dir: Path, judge: Judge | None = None, models: Models | None = None
) -> RunEvaluation:
    """Compare the saved policy with the model that training started from, and with other opponents.

    Completions and verdicts are cached. An interrupted evaluation therefore resumes where it stopped, and another
    judge reads the same completions.

    The processes of a run all call this function. They share the completions to draw, the pairs to score and the
    forward passes of a judge on this machine; the first one asks any other judge and measures.

    Args:
        cfg: Configuration of the run, resolved.
        prepared: Model, tokenizer and pairs of the run.
        run_dir: Run directory with ``policy/`` and ``coefficients.json``, the final values of alpha and beta.
        judge: Judge that ``cfg`` describes, if training has made one: its usage until now counts too.
        models: Models that :func:`load_models` has loaded, ``None`` to load them.

    Raises:
        UserError: Another run that the policy is compared with does not have samples of these prompts.
    """
    settings: EvaluationSettings = instantiate(cfg.evaluation, _convert_="all")
    if judge is None:
        judge = instantiate(cfg.judge, _convert_="all")
    models = load_models(cfg, prepared, run_dir) if models is None else models
    prompts = _prompts(prepared, settings)
    opponents = {}
    if judge is not None and rank() == 0:
        needs_chosen = "iteration" not in cfg.paths  # spo iterate adds it to every round.
        opponents = find_opponents(settings, prompts["test"], prepared.pairs.test, needs_chosen=needs_chosen)
    with training_numerics(cfg, eval_device(cfg), models.policy, models.reference, *models.further):
        with memory_for("sampling for the evaluation", "evaluation.batch_size", "evaluation.max_new_tokens"):
            completions = _draw(cfg, prepared, run_dir, models, prompts, settings)
        with memory_for("scoring the test pairs", "data.eval_batch_size", "speed.max_logits"):
            of_pairs = pair_metrics(
                build_scoring(cfg, prepared, run_dir, models),
                prepared.pairs.test,
                batch_size=cfg.data.eval_batch_size,
                pad_token_id=prepared.tokenizer.pad_token_id,
            )

    whole = prepared.language is not None
    selection = None
    # Judges that do not have a batch size do not run a model.
    judge_size = "judge.batch_size" if "batch_size" in (cfg.judge or {}) else "evaluation.num_prompts"
    with memory_for("judging", judge_size), judging(judge) as is_judging:
        if not is_judging:
            return RunEvaluation()
        test = assess(prompts["test"], *completions["test"], settings, judge, whole, opponents)
        if "selection" in prompts:
            selection = assess(prompts["selection"], *completions["selection"], _of_selection(settings), judge)
    if selection is None and whole and settings.selection_prompts > 0:
        selection = replace(test, samples=[])  # both splits consist of the whole language

    metrics = test.metrics | of_pairs
    if judge is not None:
        metrics |= {f"eval/judge/{name}": value for name, value in judge.usage().items()}
    metrics |= _selection_metrics(selection)
    return RunEvaluation(metrics, test.samples, [] if selection is None else selection.samples)


def evaluate_selection(
    cfg: DictConfig, prepared: Prepared, run_dir: Path, judge: Judge | None, models: Models
) -> dict[str, float]:
    """Measure a policy on the selection split alone, as :func:`evaluate_run` does on both splits.

    An enumerable language does not have splits, and all of it is measured. All processes of a run call this together.

    Args:
        cfg: Configuration of the run, resolved.
        prepared: Model, tokenizer and pairs of the run.
        run_dir: Directory with the weights of the policy in ``policy/``.
        judge: Judge of the completions, ``None`` for none.
        models: The policy and the reference, loaded.

    Returns:
        Metrics under ``val/``; empty on other processes than the first.

    Raises:
        UserError: The selection split is not evaluated, or does not have a prompt.
    """
    settings: EvaluationSettings = instantiate(cfg.evaluation, _convert_="all")
    whole = prepared.language is not None
    split: Split = "test" if whole else "selection"
    prompts = {name: some for name, some in _prompts(prepared, settings).items() if name == split}
    if not prompts.get(split):
        raise UserError(
            "there is no selection prompt to measure on: set evaluation.selection_prompts and data.splits.selection"
        )
    memory = memory_for("sampling for the evaluation", "evaluation.batch_size", "evaluation.max_new_tokens")
    with training_numerics(cfg, eval_device(cfg), models.policy, models.reference), memory:
        completions = _draw(cfg, prepared, run_dir, models, prompts, settings)
    with judging(judge) as is_judging:
        if not is_judging:
            return {}
        return _selection_metrics(assess(prompts[split], *completions[split], _of_selection(settings), judge, whole))


def _of_selection(settings: EvaluationSettings) -> EvaluationSettings:
    """Return the settings of the selection split: self-BLEU takes seconds, and this split does not report it."""
    return replace(settings, against=[REFERENCE], self_bleu_samples=0)


def refuse_nonfinite(metrics: Mapping[str, float]) -> None:
    """Refuse a result that is not a number, which no file may hold and no comparison could use.

    Args:
        metrics: Final metrics of a run, or those of an evaluation.

    Raises:
        UserError: A metric is infinite or undefined.
    """
    if wrong := [f"{key} is {value:g}" for key, value in metrics.items() if not math.isfinite(value)]:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"the evaluation ends in numbers that are not finite ({', '.join(wrong[:3])}{more}); the policy and its "
            "samples are saved: look at them, at optimizer.lr and model.dtype, and at the rewards of the judge"
        )


def _prompts(prepared: Prepared, settings: EvaluationSettings) -> dict[Split, list[EvalPrompt]]:
    """Return the prompts of each split that is evaluated."""
    limits: dict[Split, int] = {"test": settings.num_prompts, "selection": settings.selection_prompts}
    # The splits of an enumerated language are the same, so one evaluation serves both.
    if prepared.language is not None or settings.selection_prompts == 0 or not prepared.prompts["selection"]:
        del limits["selection"]
    return {split: prepared.sampling_prompts(split, settings.max_new_tokens, limit) for split, limit in limits.items()}


def _draw(
    cfg: DictConfig,
    prepared: Prepared,
    run_dir: Path,
    models: Models,
    prompts: Mapping[Split, Sequence[EvalPrompt]],
    settings: EvaluationSettings,
) -> dict[Split, tuple[Draws, Draws]]:
    """Return completions of policy and reference for each split, from the cache if they are there."""
    digests = first_decides(lambda: _model_digests(cfg, prepared, run_dir))
    # The further KL is reported for the test split alone, so completions of the selection split do not depend on it.
    further = {split: models.further if split == "test" else () for split in prompts}
    per_prompt = settings.samples_per_prompt + settings.of_reference().samples_per_prompt
    total = per_prompt * sum(len(deal(of_split)) for of_split in prompts.values())
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=rank() > 0) as progress:
        task = progress.add_task("evaluating", total=total)
        return {
            split: draw_both(
                models.policy,
                models.reference,
                prepared.stop_ids,
                prepared.tokenizer.pad_token_id,
                of_split,
                settings,
                models.speed,
                prepared.renderer.decode,
                lambda done: progress.advance(task, done),
                partial(cached_completions, cfg.paths.cache, of_split, prepared.stop_ids, digests[split]),
                further[split],
            )
            for split, of_split in prompts.items()
        }


def _model_digests(cfg: DictConfig, prepared: Prepared, run_dir: Path) -> dict[Split, dict[str, Any]]:
    """Return what completions of each split and stage depend on.

    The policy's rows hold log-probs of the reference too, and those of the test split the further KL.
    """
    spec = prepared.spec
    reference = [model_digest(prepared.base), spec.adapter_path and model_digest(spec.adapter_path)]
    shared = {
        "dtype": spec.dtype,
        "attn_implementation": spec.attn_implementation,
        "precision": cfg.trainer.precision,
        "sharded_dtype": str(sharded_dtype(cfg)),  # A sharded policy rounds in other places.
        "reference": reference,
        "plugins": model_plugins(cfg),
    }
    policy = {**shared, "policy": model_digest(run_dir / filenames.POLICY)}
    further = [model_digest(path) for path in further_kl_models(cfg).values()]
    return {
        "selection": {"reference": shared, "policy": policy},
        "test": {"reference": shared, "policy": {**policy, "further": further} if further else policy},
    }


def _selection_metrics(selection: Evaluation | None) -> dict[str, float]:
    """Return the metrics of the selection split under ``val/``."""
    found = {} if selection is None else selection.metrics
    return {f"val/{name}": found[f"eval/{name}"] for name in SELECTION_METRICS if f"eval/{name}" in found}
