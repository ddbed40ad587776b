"""Cache of completions. Other runs evaluate the same reference, and another judge reads the same completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spo.data import EvalPrompt
from spo.evaluation.completions import Draws
from spo.evaluation.settings import EvaluationSettings
from spo.processes import first_decides
from spo.records.cache import cached
from spo.records.digests import SAMPLING_CODE, code_version, digest
from spo.records.files import read_json, write_json

CODE_DEPENDENCIES = (
    *SAMPLING_CODE,
    "data/encoding.py",
    "data/rendering.py",
    "evaluation/completions.py",
)
"""Files that cached completions depend on, besides models and prompts."""
SAMPLING_SETTINGS = ("samples_per_prompt", "max_new_tokens", "temperature", "seed")
"""Settings of the evaluation that completions depend on."""
COMPLETIONS_FILE = "draws.json"
NUMBERS = ("logps", "entropy", "other_logps", "kl", "further_kl")
"""Columns of floats of :class:`~spo.evaluation.completions.Draws`, and of lists of floats."""


def cached_completions(
    cache_dir: str | Path,
    prompts: Sequence[EvalPrompt],
    stop_ids: Sequence[int],
    model_digests: Mapping[str, Any],
    stage: str,
    settings: EvaluationSettings,
    draw: Callable[[], Draws],
) -> Draws:
    """Return completions from the cache; draw and store them if they are missing.

    All processes of a run call this together. The first one reads and writes.

    Args:
        cache_dir: Folder of the cache.
        prompts: Prompts of the completions.
        stop_ids: Tokens that end a completion.
        model_digests: Digests of the models for each stage.
        stage: ``policy`` or ``reference``, the model that draws.
        settings: Settings by which this model draws.
        draw: Function that draws all completions. All processes call it.
    """
    key = {
        "code": code_version(*CODE_DEPENDENCIES),
        "models": model_digests[stage],
        "stage": stage,
        "stop_ids": list(stop_ids),
        "prompts": digest([[prompt.prompt_id, prompt.ids] for prompt in prompts]),
        **{name: getattr(settings, name) for name in SAMPLING_SETTINGS},
    }

    def write(folder: Path | None) -> None:
        drawn = draw()
        if folder is not None:
            columns = {name: [_to_json(value) for value in values] for name, values in asdict(drawn).items()}
            write_json(folder / COMPLETIONS_FILE, columns, indent=None)

    file = cached(cache_dir, "draws", key, write) / COMPLETIONS_FILE
    stored: dict[str, Any] = first_decides(lambda: read_json(file))
    stored |= {name: [_from_json(value) for value in stored[name]] for name in NUMBERS}
    return Draws(**stored)


def _to_json(value: Any) -> Any:
    """Return a number that JSON does not have, such as a log-prob of -inf, as text; also within a list."""
    if isinstance(value, list):
        return list(map(_to_json, value))
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    return list(map(_from_json, value)) if isinstance(value, list) else float(value)
