"""Evaluation of a finished run from its directory: what `spo train` ends with, and `spo evaluate` repeats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress, TimeElapsedColumn

from spo.data import TokenizedPair
from spo.data.collate import collate
from spo.evaluation import Evaluation, EvaluationSettings, evaluate_policy
from spo.evaluation.judges import Judge
from spo.losses import as_loss
from spo.metrics import SumsAndCounts
from spo.ops import completion_logps
from spo.reports.terminal import result_panel
from spo.runtime.config import compose, job_name, parse, sugar
from spo.runtime.errors import UserError
from spo.runtime.prepare import Prepared, eval_device, prepare_run
from spo.runtime.rundir import load_config, resolved, write_json
from spo.runtime.terminal import quiet_libraries

CHANGEABLE = ("data", "evaluation", "judge", "trainer.accelerator", "trainer.devices")


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
    if not (run_dir / "policy" / "config.json").is_file():
        raise UserError(f"{run_dir} has no policy yet: finish it with spo train --resume {run_dir}")
    cfg = _changed(own, overrides)
    prepared = prepare_run(cfg, model_from=made_from)
    evaluation = evaluate_run(cfg, prepared, run_dir)
    folder = run_dir / "evaluations" / job_name(list(overrides))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(resolved(cfg))))
    write_samples(folder, evaluation.samples)
    write_json(folder / "metrics.json", evaluation.metrics)
    result_panel(evaluation.metrics, evaluation.samples, folder)
    return evaluation.metrics


def _changed(own: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The run's configuration with the overrides applied."""
    parsed = [parse(text) for text in sugar(overrides)]
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
        chosen = [one.input_line for one in parsed if one.key_or_group.partition(".")[0] == group]
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


def write_samples(folder: Path, samples: list[dict[str, Any]]) -> None:
    """Writes ``samples.jsonl``."""
    (folder / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))


def evaluate_run(cfg: DictConfig, prepared: Prepared, run_dir: Path) -> Evaluation:
    """Compares the saved policy with the model that training started from, on the test split.

    Args:
        cfg: the run's configuration.
        prepared: model, tokenizer and pairs.
        run_dir: holds ``policy/`` and ``coefficients.json``: alpha and beta as they were when training ended.
    """
    settings: EvaluationSettings = instantiate(cfg.evaluation, _convert_="all")
    judge: Judge | None = instantiate(cfg.judge, _convert_="all")
    device = eval_device(cfg)
    policy = prepared.spec.base(run_dir / "policy").requires_grad_(False).to(device)
    reference = prepared.spec.start(prepared.base).to(device)
    prompts = prepared.sampling_prompts("test", settings.max_new_tokens, settings.num_prompts)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True) as progress:
        task = progress.add_task("evaluating", total=2 * len(prompts) * settings.samples_per_prompt)
        evaluation = evaluate_policy(
            policy,
            reference,
            prepared.tokenizer,
            prompts,
            settings,
            judge,
            prepared.renderer.decode,
            lambda done: progress.advance(task, done),
            all_prompts=prepared.language is not None,
        )
    coefficients = json.loads((run_dir / "coefficients.json").read_text())
    metrics = evaluation.metrics | _pair_metrics(cfg, coefficients, policy, reference, prepared)
    return Evaluation(metrics, evaluation.samples)


@torch.no_grad()
def _pair_metrics(
    cfg: DictConfig,
    coefficients: Mapping[str, float],
    policy: torch.nn.Module,
    reference: torch.nn.Module,
    prepared: Prepared,
) -> dict[str, float]:
    """Accuracy and margin of the method's implicit reward on the pairs of the test split."""
    loss = as_loss(instantiate(cfg.method.loss, _convert_="all"))
    names = ("rewards/accuracies", "rewards/margins")
    metric = SumsAndCounts(names, over_ranks=False)
    pairs: list[TokenizedPair] = prepared.pairs.test
    size = cfg.data.eval_batch_size
    for first in range(0, len(pairs), size):
        chunk = pairs[first : first + size]
        batch = collate(chunk, range(len(chunk)), prepared.tokenizer.pad_token_id).to(next(policy.parameters()).device)
        seen = batch.list_logps if loss.uses_lists else batch.pair_logps
        logps = seen(completion_logps(policy, batch.sequences), completion_logps(reference, batch.sequences))
        values = loss.metrics(logps, alpha=coefficients["alpha"], beta=coefficients["beta"])
        metric.update({name: values[name].cpu() for name in names if name in values})
    return {f"eval/{key}": value for key, value in metric.compute().items()}
