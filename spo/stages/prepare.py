"""What comes before alignment: the reference model, and the preference pairs as tokens."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from spo.batching import by_length
from spo.callbacks import Progress
from spo.data import (
    Completion,
    DataError,
    EvalPrompt,
    PreparedPairs,
    Renderer,
    Row,
    RowError,
    Source,
    TokenizedPair,
    eval_prompts,
    prompt_id,
)
from spo.data.datamodule import PreferenceDataModule
from spo.data.enumerable import Language
from spo.data.rows import SPLITS, Split
from spo.data.splits import prepare
from spo.forward.speed import Speed
from spo.losses import SFTLoss
from spo.models import ModelSpec, NoReference
from spo.models.policy import save_policy
from spo.module import AlignmentModule
from spo.objective import Prompts
from spo.records.cache import cached
from spo.records.digests import code_version, model_digest, path_digest
from spo.records.files import read_json, read_jsonl, write_json, write_jsonl
from spo.regularizers import NoRegularizer
from spo.sampling import derive_seed, sample
from spo.schedules import Constant

log = logging.getLogger(__name__)
PROMPTS_PER_BATCH = 512
CODE_DEPENDENCIES = (
    "types.py",
    "batching.py",
    "ops",
    "data",
    "models",
    "sampling",
    "seeds.py",
    "forward",
    "module.py",
    "objective",
    "regularizers/base.py",
    "losses/sft.py",
    "stages/prepare.py",
)
"""Files that cached models and pairs follow from. A change elsewhere in the package leaves them valid."""
ROWS, DROPPED = "rows.jsonl", "dropped.json"


@dataclass(frozen=True)
class Prepared:
    """Everything that training and evaluation start from.

    Attributes:
        spec: how models are loaded.
        base: folder of the weights that training starts from, which are the reference's too.
        tokenizer: theirs.
        renderer: from text to tokens and back.
        pairs: the data set, tokenised and split.
        prompts: of each split, to sample from: those the source states, else those of the pairs.
        bad_rows: rows that were skipped (``data.on_bad_row=skip``).
        language: every response there is, where the data can be enumerated.
    """

    spec: ModelSpec
    base: str
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    pairs: PreparedPairs
    prompts: dict[Split, list[EvalPrompt]]
    bad_rows: list[RowError]
    language: Language | None

    def sampling_prompts(self, split: Split, max_new_tokens: int, limit: int | None = None) -> list[EvalPrompt]:
        """Prompts of a split that leave room for ``max_new_tokens`` within the context.

        Raises:
            DataError: none does.
        """
        room = self.renderer.max_length - max_new_tokens
        every = self.prompts[split]
        fitting = [prompt for prompt in every if len(prompt.ids) <= room]
        if every and not fitting:
            raise DataError(
                f"none of the {len(every)} {split} prompts leaves room for {max_new_tokens} sampled tokens within "
                f"data.max_length={self.renderer.max_length}: set data.max_new_tokens lower"
            )
        return fitting[:limit]


def model_spec(cfg: DictConfig) -> ModelSpec:
    """The ``model`` group as an object, without the defaults it lends to other groups."""
    names = [field.name for field in dataclasses.fields(ModelSpec)]
    return ModelSpec(**instantiate({name: cfg.model[name] for name in names}, _convert_="all"))


def prepare_run(cfg: DictConfig, model_from: DictConfig | None = None) -> Prepared:
    """Makes, or finds in the cache, the reference model and the preference pairs.

    Args:
        cfg: the run's configuration, resolved.
        model_from: the configuration that the reference model follows from, where it is not ``cfg``: another data
            set for the evaluation does not make another reference.

    Raises:
        DataError: the data cannot be used as asked.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    spec = model_spec(cfg)
    source: Source = instantiate(cfg.data.source, _convert_="all")
    maker = cfg if model_from is None else model_from
    made_from: Source = source if model_from is None else instantiate(maker.data.source, _convert_="all")
    base = _reference_model(maker, spec, made_from)
    tokenizer = spec.tokenizer(base)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masks go by position, so that the two may coincide
    _check_context(cfg, spec, base)
    language: Language | None = source.language
    renderer = _renderer(cfg, tokenizer, source)
    rows, dropped = _preference_rows(cfg, spec, source, base, renderer)
    if not rows and dropped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise DataError(
            f"none of the sampled pairs can be used ({reasons}): the reference model does not end its completions "
            "within data.max_new_tokens; raise it, or sft.max_steps"
        )
    selection, test = (0.0, 0.0) if language else (cfg.data.splits.selection, cfg.data.splits.test)
    pairs = prepare(rows, renderer, cfg.data.seed, selection, test, cfg.data.min_pairs)
    if language:  # the data is all there is to know: nothing can be held out
        counts = pairs.counts | dict.fromkeys(SPLITS, len(pairs.train))
        pairs = dataclasses.replace(pairs, selection=pairs.train, test=pairs.train, counts=counts)
    bad_rows: list[RowError] = list(source.bad_rows)
    if left_out := source.dropped_responses:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
        pairs.warnings.append(f"{sum(left_out.values())} responses were left out of their lists ({reasons})")
    lost = sum(dropped.values()) + len(bad_rows)
    counts = {**pairs.counts, "read": pairs.counts["read"] + lost, "dropped": pairs.counts["dropped"] + lost}
    prompts = {split: _prompts(source, split, pairs, renderer) for split in SPLITS}
    pairs = dataclasses.replace(pairs, counts=counts)
    return Prepared(spec, base, tokenizer, renderer, pairs, prompts, bad_rows, language)


def _renderer(cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, source: Source) -> Renderer:
    # To an enumerable language the empty response belongs; elsewhere one says nothing.
    allow_empty = source.language is not None
    return Renderer(tokenizer, cfg.data.max_length, cfg.data.truncation, allow_empty)


def _prompts(source: Source, split: Split, pairs: PreparedPairs, renderer: Renderer) -> list[EvalPrompt]:
    """The prompts of a split.

    A source that has prompts of its own states them, so that a prompt whose sampled pair could not be used is still
    evaluated: whether it can depends on the last bit of the reference model.
    """
    texts = source.prompts(split)
    if texts is None:
        return eval_prompts(getattr(pairs, split))
    stated = [EvalPrompt(prompt_id(text), split, renderer.prompt_ids(text), text) for text in texts]
    return sorted({prompt.prompt_id: prompt for prompt in stated}.values(), key=lambda prompt: prompt.prompt_id)


def eval_device(cfg: DictConfig) -> torch.device:
    """Where models run outside the Trainer."""
    on_gpu = cfg.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _check_context(cfg: DictConfig, spec: ModelSpec, base: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, trust_remote_code=spec.trust_remote_code)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and cfg.data.max_length > context:
        raise DataError(
            f"data.max_length={cfg.data.max_length} is longer than the model's context of {context} tokens: "
            f"set data.max_length={context} or less"
        )


# --- the reference model -------------------------------------------------------------------------------------------


def _reference_model(cfg: DictConfig, spec: ModelSpec, source: Source) -> str:
    """Folder or hub name of the weights that alignment starts from."""
    if spec.initial is None and cfg.sft.max_steps == 0:
        assert spec.path is not None
        return spec.path
    key = {
        "code": code_version(*CODE_DEPENDENCIES),
        "initial": OmegaConf.to_container(cfg.model.initial, resolve=True) if cfg.model.initial else None,
        "weights": None if spec.path is None else model_digest(spec.path),
        "dtype": spec.dtype,
        "sft": OmegaConf.to_container(cfg.sft, resolve=True),
        "data": _data_key(cfg),
        "rendering": [cfg.data.max_length, cfg.data.truncation, cfg.data.seed],
    }
    return str(cached(cfg.paths.cache, "sft", key, partial(_fine_tune, cfg, spec, source)))


def _fine_tune(cfg: DictConfig, spec: ModelSpec, source: Source, folder: Path) -> None:
    if spec.initial is not None:
        model, tokenizer = spec.initial()
    else:
        assert spec.path is not None
        model, tokenizer = spec.base(spec.path), spec.tokenizer(spec.path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if cfg.sft.max_steps > 0:
        rows = source.sft_rows()
        if rows is None:
            rows = [dataclasses.replace(row, rejected=None, worse=()) for row in source.rows(_no_completer)]
        renderer = _renderer(cfg, tokenizer, source)
        train = prepare(rows, renderer, cfg.data.seed, 0.0, 0.0, min_pairs=1).train
        _fit_supervised(cfg, model.train(), train, tokenizer)
    save_policy(model, tokenizer, folder)


def _fit_supervised(cfg: DictConfig, model: Any, train: list[TokenizedPair], tokenizer: Any) -> None:
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
            num_warmup_steps=sft.num_warmup_steps,
            num_training_steps=sft.max_steps,
        ),
        prompts=Prompts([], [], tokenizer.eos_token_id, pad),
        probe=None,
        clip_norm=sft.clip_norm,
        micro_batch_size=None,
        micro_batch_tokens=None,
        log_every_n_steps=20,
        seed=cfg.data.seed,
        speed=Speed(**cfg.speed),
    )
    data = PreferenceDataModule(
        train,
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
    log.info("making the reference model: %d steps of supervised fine-tuning", sft.max_steps)
    trainer = Trainer(
        accelerator=eval_device(cfg).type,
        devices=1,
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
    trainer.fit(module, datamodule=data)
    model.cpu()


def _no_completer(prompts: Sequence[str], n: int) -> list[list[Completion]]:
    raise DataError("this data needs a reference model to write its completions, so it cannot make one")


# --- the pairs -----------------------------------------------------------------------------------------------------


def _data_key(cfg: DictConfig) -> dict[str, Any]:
    key: dict[str, Any] = {"source": OmegaConf.to_container(cfg.data.source, resolve=True)}
    if cfg.data.path is not None:
        key["content"] = path_digest(cfg.data.path)
    return key


def _preference_rows(
    cfg: DictConfig, spec: ModelSpec, source: Source, base: str, renderer: Renderer
) -> tuple[list[Row], dict[str, int]]:
    """The rows, and how many pairs the source itself left out, by reason."""
    if not source.samples_rows:
        return source.rows(_no_completer)[: cfg.data.limit], {}

    def write(folder: Path) -> None:
        log.info("sampling the preference pairs from the reference model")
        model = spec.start(base).to(eval_device(cfg))
        rows = source.rows(partial(_complete, cfg, model, renderer))
        write_jsonl(folder / ROWS, map(dataclasses.asdict, rows))
        write_json(folder / DROPPED, source.dropped_pairs)

    key = {
        "code": code_version(*CODE_DEPENDENCIES),
        "base": model_digest(base),
        "adapter": spec.adapter_path and model_digest(spec.adapter_path),
        "dtype": spec.dtype,
        "data": _data_key(cfg),
        "max_new_tokens": cfg.data.max_new_tokens,
        "seed": cfg.data.seed,
    }
    folder = cached(cfg.paths.cache, "pairs", key, write)
    return [Row(**row) for row in read_jsonl(folder / ROWS)], read_json(folder / DROPPED)


def _complete(
    cfg: DictConfig, model: Any, renderer: Renderer, prompts: Sequence[str], n: int
) -> list[list[Completion]]:
    """Draws ``n`` completions of each prompt from the reference model."""
    ids = [renderer.prompt_ids(prompt) for prompt in prompts for _ in range(n)]
    seeds = [derive_seed("pairs", cfg.data.seed, prompt, i) for prompt in prompts for i in range(n)]
    drawn: dict[int, Completion] = {}
    for rows in track(by_length([*map(len, ids)], PROMPTS_PER_BATCH), "sampling pairs", transient=True):
        sequences = sample(
            model,
            [ids[row] for row in rows],
            max_new_tokens=cfg.data.max_new_tokens,
            temperature=1.0,
            eos_token_id=renderer.eos_id,
            pad_token_id=renderer.tokenizer.pad_token_id,
            seeds=[seeds[row] for row in rows],
            sampler=cfg.speed.sampler,
        )
        for row, tokens in zip(rows, sequences.completions(), strict=True):
            drawn[row] = Completion(renderer.decode(tokens), tokens[-1:] == [renderer.eos_id])
    return [[drawn[i] for i in range(first, first + n)] for first in range(0, len(ids), n)]
