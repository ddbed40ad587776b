"""Completions that those of the policy are compared with, besides those of the reference."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from spo.data import EvalPrompt, TokenizedPair
from spo.data.needs import is_desirable
from spo.errors import UserError
from spo.evaluation.assess import Opponent
from spo.evaluation.settings import EvaluationSettings
from spo.metrics.catalogue import CHOSEN, REFERENCE
from spo.notes import note
from spo.records import filenames
from spo.records.files import load_yaml, read_jsonl

log = logging.getLogger(__name__)


def find_opponents(
    settings: EvaluationSettings,
    prompts: Sequence[EvalPrompt],
    pairs: Sequence[TokenizedPair],
    *,
    needs_chosen: bool = True,
) -> dict[str, Opponent]:
    """Return what the policy is compared with besides the reference, by name.

    Args:
        settings: Settings of the evaluation; ``against`` lists the opponents.
        prompts: Prompts of the test split.
        pairs: Pairs of the test split.
        needs_chosen: False to leave ``chosen`` out, with a note, where no prompt has a chosen response.

    Raises:
        UserError: No prompt has a pair, or another run does not have samples of these prompts.
    """
    found: dict[str, Opponent] = {}
    for name in settings.against:
        if name == CHOSEN:
            if responses := _chosen_responses(settings, prompts, pairs):
                found[name] = responses
            elif needs_chosen:
                raise UserError(
                    "evaluation.against=[chosen]: none of the test prompts has a chosen or desirable response; leave "
                    "chosen out"
                )
            else:
                note(
                    "no_chosen_responses",
                    f"none of the {len(prompts)} test prompts has a chosen response, so the data is not an opponent",
                    len(prompts),
                )
        elif name != REFERENCE:
            folder = Path(name).expanduser()
            found[folder.resolve().name] = _samples_of_run(folder, settings, prompts)
    return found


def _chosen_responses(
    settings: EvaluationSettings, prompts: Sequence[EvalPrompt], pairs: Sequence[TokenizedPair]
) -> Opponent:
    """Return the chosen responses of the data, by prompt and sample; empty where there are none.

    If a prompt has several pairs, its samples are compared with their chosen responses in turn. The chosen responses of
    labelled data are the desirable ones.
    """
    responses: dict[str, list[tuple[str, int]]] = {}
    for pair in pairs:
        if not is_desirable(pair.label):
            continue
        responses.setdefault(pair.prompt_id, []).append((pair.chosen_text, len(pair.chosen_ids)))
    answered = [prompt.prompt_id for prompt in prompts if prompt.prompt_id in responses]
    if answered and (without_pair := len(prompts) - len(answered)):
        log.warning(
            "the comparison with chosen responses leaves out %d of %d test prompts, which do not have one",
            without_pair,
            len(prompts),
        )
    return {
        (name, i): responses[name][i % len(responses[name])]
        for name in answered
        for i in range(settings.samples_per_prompt)
    }


def _samples_of_run(folder: Path, settings: EvaluationSettings, prompts: Sequence[EvalPrompt]) -> Opponent:
    """Return the completions of another run for the same prompts, by prompt and sample.

    Two runs with the same evaluation seed draw samples of the same number with the same random numbers. Such samples
    are alike if the policies are, and a win rate between them is further from 0.5 than one of independent samples. A
    sample therefore meets the next one of the other run.
    """
    rows = read_jsonl(folder / filenames.SAMPLES)
    found = {(row["prompt_id"], row["sample_index"]): (row["completion"], row["tokens"]) for row in rows}
    wanted = [(prompt.prompt_id, i) for prompt in prompts for i in range(settings.samples_per_prompt)]
    count = settings.samples_per_prompt
    if all((prompt.prompt_id, count) in found for prompt in prompts):
        count += 1
    if absent := [one for one in wanted if one not in found]:
        raise UserError(
            f"{folder} was evaluated on other prompts: it does not have samples for {len(absent)} of the {len(wanted)} "
            f"that are compared. Evaluate both with the same data, evaluation.num_prompts={settings.num_prompts} and "
            f"evaluation.samples_per_prompt={settings.samples_per_prompt} (spo evaluate {folder} ...), and name the "
            "folder of that evaluation"
        )
    if count == 1 and _evaluation_seed(folder) == settings.seed:
        note(
            "equal_evaluation_seeds",
            f"evaluation.against: the samples of {folder} and of this run are drawn with the same random numbers "
            f"(evaluation.seed={settings.seed}), which moves the win rate away from 0.5; another evaluation.seed, or "
            "evaluation.samples_per_prompt of 2 or more, compares independent samples",
        )
    return {(prompt, i): found[prompt, (i + 1) % count] for prompt, i in wanted}


def _evaluation_seed(folder: Path) -> Any:
    """Return the seed of the samples in a run directory or the folder of an evaluation; ``None`` if it is unknown."""
    try:
        config = load_yaml((folder / filenames.CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    evaluation = config.get("evaluation") if isinstance(config, Mapping) else None
    return evaluation.get("seed") if isinstance(evaluation, Mapping) else None
