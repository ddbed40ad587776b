"""Evaluation of a finished run from its directory: what `spo train` ends with, and `spo evaluate` repeats."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress, TimeElapsedColumn

from spo.config.checks import check_config
from spo.config.compose import compose, expand_numbers, job_name, parse
from spo.data import EvalPrompt, TokenizedPair
from spo.data.collate import collate
from spo.data.rows import Split
from spo.errors import UserError
from spo.evaluation import EvaluationSettings
from spo.evaluation.assess import Opponent, assess, draw_both
from spo.evaluation.completions import Draws
from spo.evaluation.judges import Judge
from spo.evaluation.settings import CHOSEN, REFERENCE
from spo.forward.speed import Speed
from spo.losses import Loss
from spo.metrics.calibration import Calibration
from spo.metrics.sums import SumsAndCounts
from spo.pages.panels import result_panel
from spo.records import filenames
from spo.records.cache import cached
from spo.records.digests import code_version, digest, model_digest
from spo.records.files import read_json, read_jsonl, write_json, write_jsonl, write_text
from spo.runs.saved_config import load_config, resolved
from spo.stages.prepare import Prepared, eval_device, prepare_run
from spo.stages.quiet import quiet_libraries

log = logging.getLogger(__name__)
CHANGEABLE = ("data", "evaluation", "judge", "trainer.accelerator", "trainer.devices")
VAL = ("win_rate", "win_rate_ci_low", "win_rate_ci_high", "reward", "kl", "entropy")
"""What the final evaluation measures on the selection split, for choosing between settings."""
DRAWN_WITH = ("samples_per_prompt", "max_new_tokens", "temperature", "seed")
CODE_DEPENDENCIES = (
    "types.py",
    "batching.py",
    "ops",
    "models",
    "sampling",
    "seeds.py",
    "forward",
    "data/rendering.py",
    "evaluation/completions.py",
)
"""Files that cached completions follow from, beside models and prompts."""
DRAWS = "draws.json"


def evaluate_command(run_dir: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Evaluates the policy of a finished run again, as it was or with other data or settings.

    The run's own record stays as it is: the result goes to ``evaluations/NAME`` inside the run directory, named
    after the overrides.

    Args:
        run_dir: of a run that has written its policy.
        overrides: of the groups ``data``, ``evaluation`` and ``judge``, and of the device.

    Returns:
        The metrics.

    Raises:
        UserError: there is no policy, or an override is of another group.
    """
    quiet_libraries()
    own = load_config(run_dir)
    made_from = OmegaConf.create(OmegaConf.to_container(own, resolve=True))
    assert isinstance(made_from, DictConfig)
    if not (run_dir / filenames.POLICY / "config.json").is_file():
        raise UserError(f"{run_dir} has no policy yet: finish it with spo train --resume {run_dir}")
    cfg = _changed(own, overrides)
    check_config(cfg)
    prepared = prepare_run(cfg, model_from=made_from)
    evaluation = evaluate_run(cfg, prepared, run_dir)
    folder = run_dir / filenames.EVALUATIONS / job_name(list(overrides))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / filenames.CONFIG, OmegaConf.to_yaml(OmegaConf.create(resolved(cfg))))
    evaluation.write_samples(folder)
    write_json(folder / filenames.METRICS, evaluation.metrics)
    result_panel(evaluation.metrics, evaluation.samples, folder)
    return evaluation.metrics


def _changed(own: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The run's configuration with the overrides applied."""
    parsed = [parse(text) for text in expand_numbers(overrides)]
    refused = [
        one.input_line
        for one in parsed
        if not any(one.key_or_group == key or one.key_or_group.startswith(f"{key}.") for key in CHANGEABLE)
    ]
    if refused:
        raise UserError(
            f"an evaluation can change {', '.join(CHANGEABLE)} only, not {', '.join(map(str, refused))}: "
            "train a run of its own for that"
        )
    cfg = OmegaConf.create(OmegaConf.to_container(own, resolve=False))
    assert isinstance(cfg, DictConfig)
    for group in {one.key_or_group for one in parsed} & {"data", "evaluation", "judge"}:
        of_group = (one.input_line for one in parsed if one.key_or_group.partition(".")[0] == group)
        chosen = [line for line in of_group if line is not None]
        cfg[group] = OmegaConf.to_container(compose(chosen, run_dir=own.paths.run)[group], resolve=False)
    OmegaConf.set_struct(cfg, True)
    for one in parsed:
        if "." in one.key_or_group:
            try:
                OmegaConf.update(cfg, one.key_or_group, one.value())
            except Exception as error:
                raise UserError(f"{one.input_line}: the configuration of the run has no such key ({error})") from error
    values = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(values, DictConfig)
    return values


@dataclass(frozen=True)
class RunEvaluation:
    """Metrics, and the samples of both splits that they come from."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    selection_samples: list[dict[str, Any]]

    def write_samples(self, folder: Path) -> None:
        """Writes ``samples.jsonl`` and, where the selection split was evaluated, ``samples.selection.jsonl``."""
        for name, rows in ((filenames.SAMPLES, self.samples), (filenames.SELECTION_SAMPLES, self.selection_samples)):
            if rows:
                write_jsonl(folder / name, rows)


def evaluate_run(cfg: DictConfig, prepared: Prepared, run_dir: Path, judge: Judge | None = None) -> RunEvaluation:
    """Compares the saved policy with the model that training started from, and with what else is asked for.

    Completions and verdicts are kept in the cache, so that an evaluation that was interrupted goes on where it stopped,
    and another judge reads the same completions.

    Args:
        cfg: the run's configuration.
        prepared: model, tokenizer and pairs.
        run_dir: holds ``policy/`` and ``coefficients.json``: alpha and beta as they were when training ended.
        judge: that ``cfg`` describes, where there is one already: what it spent before is counted too.

    Raises:
        UserError: another run that the policy is to be compared with has no samples of these prompts.
    """
    settings: EvaluationSettings = instantiate(cfg.evaluation, _convert_="all")
    if judge is None:
        judge = instantiate(cfg.judge, _convert_="all")
    device = eval_device(cfg)
    # As nn.Module, because the `to` of PreTrainedModel is wrapped in a way that hides its arguments from type checkers.
    saved: torch.nn.Module = prepared.spec.base(run_dir / filenames.POLICY)
    policy = saved.requires_grad_(False).to(device)
    reference = prepared.spec.start(prepared.base).to(device)
    speed = Speed(**cfg.speed).resolve_for(policy, reference)
    limits: dict[Split, int] = {"test": settings.num_prompts, "selection": settings.selection_prompts}
    if prepared.language is not None or settings.selection_prompts == 0 or not prepared.prompts["selection"]:
        del limits["selection"]  # of a language that is enumerated the splits are one and the same
    prompts = {
        split: prepared.sampling_prompts(split, settings.max_new_tokens, limit) for split, limit in limits.items()
    }
    opponents = _opponents(settings, prompts["test"], prepared.pairs.test) if judge is not None else {}
    digests = _model_digests(cfg, prepared, run_dir)
    total = 2 * sum(map(len, prompts.values())) * settings.samples_per_prompt
    drawn = {}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True) as progress:
        task = progress.add_task("evaluating", total=total)
        for split in prompts:
            drawn[split] = draw_both(
                policy,
                reference,
                prepared.tokenizer,
                prompts[split],
                settings,
                speed,
                prepared.renderer.decode,
                lambda done: progress.advance(task, done),
                partial(_kept, cfg, settings, prompts[split], digests),
            )
    whole = prepared.language is not None
    test = assess(prompts["test"], *drawn["test"], settings, judge, whole, opponents)
    selection = None
    if "selection" in prompts:
        against_reference = replace(settings, against=[REFERENCE])
        selection = assess(prompts["selection"], *drawn["selection"], against_reference, judge)
    elif whole and settings.selection_prompts > 0:
        selection = replace(test, samples=[])
    metrics = test.metrics | _pair_metrics(cfg, run_dir, policy, reference, prepared, speed)
    if judge is not None:
        metrics |= {f"eval/judge/{name}": value for name, value in judge.usage().items()}
    if selection is not None:
        known = selection.metrics
        metrics |= {f"val/{name}": known[f"eval/{name}"] for name in VAL if f"eval/{name}" in known}
    return RunEvaluation(metrics, test.samples, [] if selection is None else selection.samples)


def _model_digests(cfg: DictConfig, prepared: Prepared, run_dir: Path) -> dict[str, Any]:
    spec = prepared.spec
    reference = [model_digest(prepared.base), spec.adapter_path and model_digest(spec.adapter_path)]
    shared = {"dtype": spec.dtype, "attn_implementation": spec.attn_implementation, "reference": reference}
    return {"reference": shared, "policy": {**shared, "policy": model_digest(run_dir / filenames.POLICY)}}


def _kept(
    cfg: DictConfig,
    settings: EvaluationSettings,
    prompts: Sequence[EvalPrompt],
    digests: Mapping[str, Any],
    stage: str,
    draw: Callable[[], Draws],
) -> Draws:
    """Completions from the cache, drawn for it where they are not there: another run has the same of the reference."""
    key = {
        "code": code_version(*CODE_DEPENDENCIES),
        "models": digests[stage],
        "stage": stage,
        "prompts": digest([[prompt.prompt_id, prompt.ids] for prompt in prompts]),
        **{name: getattr(settings, name) for name in DRAWN_WITH},
    }

    def write(folder: Path) -> None:
        write_json(folder / DRAWS, asdict(draw()), indent=None)

    return Draws(**read_json(cached(cfg.paths.cache, "draws", key, write) / DRAWS))


def _opponents(
    settings: EvaluationSettings, prompts: Sequence[EvalPrompt], pairs: Sequence[TokenizedPair]
) -> dict[str, Opponent]:
    found: dict[str, Opponent] = {}
    for name in settings.against:
        if name == CHOSEN:
            found[name] = _chosen(settings, prompts, pairs)
        elif name != REFERENCE:
            folder = Path(name).expanduser()
            found[folder.resolve().name] = _samples_of(folder, settings, prompts)
    return found


def _chosen(
    settings: EvaluationSettings, prompts: Sequence[EvalPrompt], pairs: Sequence[TokenizedPair]
) -> dict[tuple[str, int], tuple[str, int]]:
    """The data's chosen responses; of a prompt with several pairs the samples meet them in turn."""
    responses: dict[str, list[tuple[str, int]]] = {}
    for pair in pairs:
        responses.setdefault(pair.prompt_id, []).append((pair.chosen_text, len(pair.chosen_ids)))
    known = [prompt.prompt_id for prompt in prompts if prompt.prompt_id in responses]
    if not known:
        raise UserError("evaluation.against=[chosen]: none of the test prompts has a pair; leave chosen out")
    if left_out := len(prompts) - len(known):
        log.warning(
            "%d of %d test prompts have no pair: the chosen responses say nothing there", left_out, len(prompts)
        )
    return {
        (name, i): responses[name][i % len(responses[name])]
        for name in known
        for i in range(settings.samples_per_prompt)
    }


def _samples_of(
    folder: Path, settings: EvaluationSettings, prompts: Sequence[EvalPrompt]
) -> dict[tuple[str, int], tuple[str, int]]:
    rows = read_jsonl(folder / filenames.SAMPLES)
    found = {(row["prompt_id"], row["sample_index"]): (row["completion"], row["tokens"]) for row in rows}
    wanted = [(prompt.prompt_id, i) for prompt in prompts for i in range(settings.samples_per_prompt)]
    if absent := [one for one in wanted if one not in found]:
        raise UserError(
            f"{folder} was evaluated on other prompts: it has no sample for {len(absent)} of the {len(wanted)} that "
            f"are compared. Evaluate both with the same data, evaluation.num_prompts={settings.num_prompts} and "
            f"evaluation.samples_per_prompt={settings.samples_per_prompt} (spo evaluate {folder} ...), and name the "
            "folder of that evaluation"
        )
    return {one: found[one] for one in wanted}


@torch.no_grad()
def _pair_metrics(
    cfg: DictConfig,
    run_dir: Path,
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    prepared: Prepared,
    speed: Speed,
) -> dict[str, float]:
    """Accuracy, margin and calibration of the method's implicit reward on the pairs of the test split."""
    coefficients = read_json(run_dir / filenames.COEFFICIENTS)
    loss: Loss[Any] = instantiate(cfg.method.loss, _convert_="all")
    names = ("rewards/accuracies", "rewards/margins")
    metric, calibration = SumsAndCounts(names, over_ranks=False), Calibration(over_ranks=False)
    pairs: list[TokenizedPair] = prepared.pairs.test
    size, pad_token_id = cfg.data.eval_batch_size, prepared.tokenizer.pad_token_id
    device = next(policy.parameters()).device
    for first in range(0, len(pairs), size):
        chunk = pairs[first : first + size]
        batch = collate(chunk, range(len(chunk)), pad_token_id, arrange=speed.arrange).to(device)
        seen = batch.list_logps if loss.uses_lists else batch.pair_logps
        logps = seen(*(speed.logps(model, batch.sequences) for model in (policy, reference)))
        values = loss.metrics(logps, alpha=coefficients["alpha"], beta=coefficients["beta"])
        metric.update({name: values[name].cpu() for name in names if name in values})
        if "rewards/margins" in values and len(batch.mask()) == 2:  # of a list there is no single preference
            preference = None if batch.preference is None else batch.preference.cpu()
            calibration.update(values["rewards/margins"].cpu(), preference)
    reliability = calibration.compute() if calibration.update_called else {}  # of completions alone there is none
    found = metric.compute() | {f"calibration/{name}": value for name, value in reliability.items()}
    return {f"eval/{key}": value for key, value in found.items()}
