"""Rows of the preference data: read from the source, or sampled from the reference model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.progress import track

from spo.batching import by_length
from spo.data import Completion, DataError, Renderer, Row, Source
from spo.models import ModelSpec
from spo.records.cache import cached
from spo.records.digests import code_version, model_digest
from spo.records.files import read_json, read_jsonl, write_json, write_jsonl
from spo.sampling import contents, derive_seed, is_finished, sample
from spo.stages.from_config import data_key, eval_device, model_plugins, rendering_key

log = logging.getLogger(__name__)
COMPLETIONS_PER_BATCH = 512
CODE_DEPENDENCIES = (
    "types",
    "batching.py",
    "ops",
    "data",
    "models",
    "sampling",
    "seeds.py",
    "forward",
    "stages/from_config.py",
    "stages/pairs.py",
)
"""Files that cached pairs depend on, in addition to the reference model. Other changes leave them valid."""
ROWS_FILE, DROPPED_FILE = "rows.jsonl", "dropped.json"


def preference_rows(
    cfg: DictConfig, spec: ModelSpec, source: Source, base: str, renderer: Renderer
) -> tuple[list[Row], dict[str, int]]:
    """Return the rows of the data, and how many pairs the source dropped, by reason.

    Args:
        cfg: Configuration of the run, resolved.
        spec: Settings for loading models.
        source: Source of the rows. If it samples them, the reference model writes the completions.
        base: Folder or hub name of the reference model.
        renderer: Conversion between texts and tokens.
    """
    if not source.samples_rows:
        return source.rows(no_completer)[: cfg.data.limit], {}

    def write(folder: Path) -> None:
        log.info("sampling the preference pairs from the reference model")
        model = spec.start(base).to(eval_device(cfg))
        rows = source.rows(partial(_complete, cfg, model, renderer))
        write_jsonl(folder / ROWS_FILE, map(dataclasses.asdict, rows))
        write_json(folder / DROPPED_FILE, source.dropped_pairs)

    key = {
        "code": code_version(*CODE_DEPENDENCIES),
        "base": model_digest(base),
        "adapter": spec.adapter_path and model_digest(spec.adapter_path),
        "plugins": model_plugins(cfg),
        "dtype": spec.dtype,
        "data": data_key(cfg),
        "rendering": rendering_key(cfg),
        "max_new_tokens": cfg.data.max_new_tokens,
        "stop_ids": renderer.stop_ids,
        "seed": cfg.data.seed,
    }
    folder = cached(cfg.paths.cache, "pairs", key, write)
    return [Row(**row) for row in read_jsonl(folder / ROWS_FILE)], read_json(folder / DROPPED_FILE)


def _complete(
    cfg: DictConfig, model: Any, renderer: Renderer, prompts: Sequence[str], n: int
) -> list[list[Completion]]:
    """Draw ``n`` completions of each prompt from the reference model."""
    ids = [renderer.prompt_ids(prompt) for prompt in prompts for _ in range(n)]
    seeds = [derive_seed("pairs", cfg.data.seed, prompt, i) for prompt in prompts for i in range(n)]
    stop_ids, drawn = renderer.stop_ids, dict[int, Completion]()
    for rows in track(by_length([*map(len, ids)], COMPLETIONS_PER_BATCH), "sampling pairs", transient=True):
        sequences = sample(
            model,
            [ids[row] for row in rows],
            max_new_tokens=cfg.data.max_new_tokens,
            temperature=1.0,
            stop_ids=stop_ids,
            pad_token_id=renderer.tokenizer.pad_token_id,
            seeds=[seeds[row] for row in rows],
            sampler=cfg.speed.sampler,
        )
        texts = map(renderer.decode, contents(sequences, stop_ids))
        finished = is_finished(sequences, stop_ids).tolist()
        drawn |= zip(rows, map(Completion, texts, finished), strict=True)
    return [[drawn[i] for i in range(first, first + n)] for first in range(0, len(ids), n)]


def no_completer(prompts: Sequence[str], n: int) -> list[list[Completion]]:
    """Raise an error: in place of the reference model for data that is read before the model exists."""
    raise DataError("this data needs a reference model to write its completions, so it cannot train one")
