"""Rows of the preference data: read from the source, or sampled from a model."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import track
from torch import nn

from spo.batching import by_length
from spo.config.nodes import targets
from spo.data import Completion, DataError, Renderer, Row, RowError, Source, prompt_id
from spo.data.encoding import Ids
from spo.data.rows import PromptRequest, Writer
from spo.models import ModelSpec
from spo.models.generation import read_stop_ids
from spo.models.library_errors import Origin
from spo.models.loading import load_config, load_tokenizer
from spo.processes import deal, gather, rank, world_size
from spo.records.cache import cached
from spo.records.digests import SAMPLING_CODE, code_version, digest, model_digest
from spo.records.files import read_json, read_jsonl, write_json, write_jsonl
from spo.records.plugins import plugin_digests
from spo.sampling import contents, derive_seed, is_finished, sample
from spo.stages.from_config import data_key, eval_device, make_renderer, model_plugins, rendering_key
from spo.types import Sequences

log = logging.getLogger(__name__)
T = TypeVar("T")
COMPLETIONS_PER_BATCH = 512
CODE_DEPENDENCIES = (
    *SAMPLING_CODE,
    "data",
    "losses/declarations.py",
    "evaluation/judges",
    "evaluation/winrate.py",
    "rounds",
    "stages/from_config.py",
    "stages/pairs.py",
)
"""Files that cached pairs depend on, in addition to the reference model. Other changes leave them valid."""
ROWS_FILE, REMARKS_FILE = "rows.jsonl", "remarks.json"


@dataclass(frozen=True)
class _LoadedWriter:
    """A model that writes completions of the data, loaded when it is needed.

    Attributes:
        load: Function that loads the model.
        renderer: Conversion between texts and the tokens of the model.
        settings: Settings of its samples.
        key: Part of a cache key that identifies what it writes.
    """

    load: Callable[[], nn.Module]
    renderer: Renderer
    settings: Writer
    key: dict[str, Any]


@dataclass(frozen=True)
class _CompletionRequest:
    """A completion to draw.

    Attributes:
        prompt: Tokens of the prompt.
        max_new_tokens: Length limit of the completion in tokens.
        seed: Random seed of the completion.
    """

    prompt: Ids
    max_new_tokens: int
    seed: int


def preference_rows(
    cfg: DictConfig, spec: ModelSpec, source: Source, base: str, renderer: Renderer
) -> tuple[list[Row], dict[str, int]]:
    """Return the rows of the data, and how many pairs the source dropped, by reason.

    Sampled completions have a cache of their own, which data with other labels shares.

    Args:
        cfg: Configuration of the run, resolved.
        spec: Settings for loading models.
        source: Source of the rows. If it samples them, a model writes the completions.
        base: Folder or hub name of the reference model.
        renderer: Conversion between texts and tokens of the reference model.
    """
    if not source.samples_rows:
        return source.rows(no_completer)[: cfg.data.limit], {}
    load = cache(partial(_writer, cfg, spec, source, base, renderer))
    own = Writer(source.writer, source.temperature)
    if source.needs_judge:
        source.judge = instantiate(cfg.judge, _convert_="all")

    def complete(
        prompts: Sequence[str | PromptRequest], n: int, /, writer: Writer | None = None
    ) -> list[list[Completion]]:
        return _completions(cfg, load(own if writer is None else writer), prompts, n)

    def build(folder: Path | None) -> None:
        rows = source.rows(complete)
        if folder is not None:
            write_jsonl(folder / ROWS_FILE, map(dataclasses.asdict, rows))
            write_json(folder / REMARKS_FILE, _remarks(source))

    key = {
        **load(own).key,
        "data": data_key(cfg),
        "columns": [
            *source.needs.number_columns,
            *source.needs.list_number_columns,
            *source.needs.text_columns,
        ],
        "writers": [load(writer).key for writer in source.further_writers],
        "judge": None if source.judge is None else [source.judge.identity, plugin_digests(targets(cfg.judge).values())],
    }
    folder = cached(cfg.paths.cache, "pairs", key, build)
    dropped = _restore(source, read_json(folder / REMARKS_FILE))
    return [_row(values) for values in read_jsonl(folder / ROWS_FILE)], dropped


def _remarks(source: Source) -> dict[str, Any]:
    """Return what a source has to say about its rows, as JSON values."""
    return {
        "dropped_pairs": source.dropped_pairs,
        "dropped_responses": source.dropped_responses,
        "findings": vars(source.findings),
        "bad_rows": [{"where": one.where, "reason": one.reason, "column": one.column} for one in source.bad_rows],
    }


def _restore(source: Source, remarks: Mapping[str, Any]) -> dict[str, int]:
    """Give a source the remarks on rows that come from the cache, and return the dropped pairs by reason."""
    source.dropped_responses = Counter(remarks["dropped_responses"])
    source.findings.counts, source.findings.first = Counter(remarks["findings"]["counts"]), remarks["findings"]["first"]
    source.bad_rows = [RowError(**one) for one in remarks["bad_rows"]]
    dropped: dict[str, int] = remarks["dropped_pairs"]
    return dropped


def _row(values: dict[str, Any]) -> Row:
    """Return a row from JSON values, in which conversations are lists."""

    def text(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    texts = {name: text(values[name]) for name in ("prompt", "chosen", "rejected", "tools")}
    return Row(**{**values, **texts, "worse": tuple(map(text, values["worse"]))})


def _writer(
    cfg: DictConfig, spec: ModelSpec, source: Source, base: str, renderer: Renderer, writer: Writer
) -> _LoadedWriter:
    """Return a model that writes completions: the reference model, or the one that a source names."""
    load: Callable[[], nn.Module]
    if writer.model is None:
        load, sampling = partial(spec.start, base), _sampling_key(cfg, spec, base)
    else:
        key_of_path = "data.source.responses" if writer.model == source.writer else "iteration.source.policies"
        origin = Origin(writer.model, key_of_path)
        config = load_config(origin, spec.trust_remote_code)
        tokenizer = load_tokenizer(origin, spec.trust_remote_code)
        stop_ids = read_stop_ids(writer.model, config.get_text_config().vocab_size)
        # Texts are exchanged, so the model may have tokens of its own.
        renderer = make_renderer(cfg, tokenizer, source, stop_ids)
        alone = dataclasses.replace(spec, adapter_path=None)
        load, sampling = partial(alone.load, origin), _sampling_key(cfg, alone, writer.model)
    key = {
        **sampling,
        "temperature": writer.temperature,
        "top_p": writer.top_p,
        "number": writer.number,
        "rendering": rendering_key(cfg),
        "stop_ids": renderer.stop_ids,
    }
    return _LoadedWriter(cache(lambda: load().to(eval_device(cfg))), renderer, writer, key)


def _completions(
    cfg: DictConfig, writer: _LoadedWriter, prompts: Sequence[str | PromptRequest], n: int
) -> list[list[Completion]]:
    """Return ``n`` completions of each prompt, drawn once and cached."""

    def build(folder: Path | None) -> None:
        if folder is not None:
            log.info("sampling completions of %d prompts for the preference pairs", len(prompts))
        drawn = _complete(cfg, writer, prompts, n)
        if folder is not None:
            write_jsonl(folder / ROWS_FILE, map(dataclasses.asdict, drawn))

    known = [prompt if isinstance(prompt, str) else vars(prompt) for prompt in prompts]
    key = {**writer.key, "prompts": digest(known), "number_of_each": n}
    folder = cached(cfg.paths.cache, "completions_for_pairs", key, build)
    drawn = [Completion(**row) for row in read_jsonl(folder / ROWS_FILE)]
    return [drawn[first : first + n] for first in range(0, len(drawn), n)]


def drawn_completions(
    cfg: DictConfig, spec: ModelSpec, base: str, renderer: Renderer, prompts: Sequence[Ids], stop_ids: Sequence[int]
) -> list[Ids]:
    """Return one completion of each prompt, drawn from the reference model once and cached.

    A completion depends on the reference model, the seed of the data and the prompt. It is cut at
    ``data.max_new_tokens``, or at ``data.max_length`` tokens with its prompt.

    Args:
        cfg: Configuration of the run, resolved.
        spec: Settings for loading models.
        base: Folder or hub name of the reference model.
        renderer: Conversion between texts and tokens.
        prompts: Tokens of distinct prompts.
        stop_ids: Tokens that end a completion.
    """

    def build(folder: Path | None) -> None:
        if folder is not None:
            log.info("sampling further completions of %d prompts from the reference model", len(prompts))
        model = spec.start(base).to(eval_device(cfg))
        drawn = _draw(cfg, model, prompts, stop_ids, renderer)
        if folder is not None:
            write_jsonl(folder / ROWS_FILE, ({"ids": ids} for ids in drawn))

    key = {
        **_sampling_key(cfg, spec, base),
        "prompts": digest([list(ids) for ids in prompts]),
        "stop_ids": list(stop_ids),
        "max_length": renderer.max_length,
    }
    folder = cached(cfg.paths.cache, "completions_of_reference", key, build)
    return [tuple(row["ids"]) for row in read_jsonl(folder / ROWS_FILE)]


def _sampling_key(cfg: DictConfig, spec: ModelSpec, base: str) -> dict[str, Any]:
    """Return the part of a cache key that identifies how the reference model samples."""
    return {
        "code": code_version(*CODE_DEPENDENCIES),
        "base": model_digest(base),
        "adapter": spec.adapter_path and model_digest(spec.adapter_path),
        "plugins": model_plugins(cfg),
        "dtype": spec.dtype,
        "max_new_tokens": cfg.data.max_new_tokens,
        "seed": cfg.data.seed,
    }


def _draw(
    cfg: DictConfig, model: Any, prompts: Sequence[Ids], stop_ids: Sequence[int], renderer: Renderer
) -> list[list[int]]:
    """Draw one completion of each prompt from the reference model, within the length limit."""
    requests = [
        _CompletionRequest(
            ids,
            min(cfg.data.max_new_tokens, renderer.max_length - len(ids)),
            derive_seed("further completions", cfg.data.seed, *ids),
        )
        for ids in prompts
    ]
    sampler = _sampler(cfg, model, renderer, stop_ids, Writer())
    return _in_batches(sampler, requests, Sequences.completions, "further completions")


def _complete(
    cfg: DictConfig, writer: _LoadedWriter, prompts: Sequence[str | PromptRequest], n: int
) -> list[Completion]:
    """Draw ``n`` completions of each prompt from the model that writes them, those of a prompt in a row."""
    renderer, settings = writer.renderer, writer.settings
    stream = ("pairs", cfg.data.seed, *(() if settings.number is None else (settings.number,)))
    requests = []
    for prompt in prompts:
        one = PromptRequest(prompt) if isinstance(prompt, str) else prompt
        ids = renderer.prompt_ids(one.prompt, tools=one.tools, template_kwargs=one.template_kwargs)
        # A prompt without room gets one token, so its completion does not end and is dropped.
        room = max(1, min(cfg.data.max_new_tokens, renderer.max_length - len(ids)))
        name = one.prompt if isinstance(one.prompt, str) else prompt_id(one.prompt, one.tools, one.template_kwargs)
        requests += [_CompletionRequest(ids, room, derive_seed(*stream, name, i)) for i in range(n)]

    def read(sequences: Sequences) -> list[Completion]:
        texts = map(renderer.decode, contents(sequences, renderer.stop_ids))
        return list(map(Completion, texts, is_finished(sequences, renderer.stop_ids).tolist()))

    sampler = _sampler(cfg, writer.load(), renderer, renderer.stop_ids, settings)
    return _in_batches(sampler, requests, read, "pairs")


def _sampler(
    cfg: DictConfig, model: Any, renderer: Renderer, stop_ids: Sequence[int], settings: Writer
) -> Callable[..., Sequences]:
    """Return :func:`spo.sampling.sample` with all arguments that do not depend on the completion."""
    return partial(
        sample,
        model,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop_ids=stop_ids,
        pad_token_id=renderer.tokenizer.pad_token_id,
        sampler=cfg.speed.sampler,
    )


def _in_batches(
    sampler: Callable[..., Sequences],
    requests: Sequence[_CompletionRequest],
    read: Callable[[Sequences], list[T]],
    what: str,
) -> list[T]:
    """Sample in batches of similar lengths, which the processes of the run share among them.

    A completion follows from its prompt and its seed, so it is the same in any number of processes, except for
    rounding in batches of another size.

    Args:
        sampler: Function of the prompts, ``max_new_tokens`` and ``seeds`` of a batch that draws its samples.
        requests: Completions to draw.
        read: Function from the samples of a batch to one result for each.
        what: Word for the completions, for the progress bar.

    Returns:
        Result for each request.
    """
    batches: list[list[int]] = []
    for length in sorted({one.max_new_tokens for one in requests}):
        alike = [i for i, one in enumerate(requests) if one.max_new_tokens == length]
        size = min(COMPLETIONS_PER_BATCH, -(-len(alike) // world_size()))
        batches += [[alike[i] for i in part] for part in by_length([len(requests[i].prompt) for i in alike], size)]

    def draw(batch: list[int]) -> list[T]:
        some = [requests[i] for i in batch]
        return read(
            sampler(
                [one.prompt for one in some],
                max_new_tokens=some[0].max_new_tokens,
                seeds=[one.seed for one in some],
            )
        )

    own = [draw(batch) for batch in track(deal(batches), f"sampling {what}", transient=True, disable=rank() > 0)]
    drawn: dict[int, T] = {}
    for batch, results in zip(batches, gather(own), strict=True):
        drawn |= zip(batch, results, strict=True)
    return [drawn[i] for i in range(len(requests))]


def no_completer(
    prompts: Sequence[str | PromptRequest], n: int, /, writer: Writer | None = None
) -> list[list[Completion]]:
    """Raise an error: in place of the reference model for data that is read before the model exists."""
    raise DataError("this data needs a reference model to write its completions, so it cannot train one")
