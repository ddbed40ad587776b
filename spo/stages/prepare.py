"""Stage before alignment: the reference model, and the preference pairs as tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from spo.config.nodes import INITIAL, extra_references
from spo.data import DataError, EvalPrompt, PreparedPairs, Renderer, Row, RowError, Source, eval_prompts, prompt_id
from spo.data.enumerable import Language
from spo.data.needs import Draw
from spo.data.rows import SPLITS, Split
from spo.data.splits import prepare
from spo.losses.sequential_po import EARLIER_REWARD
from spo.models import ModelSpec
from spo.models.generation import note_stops_in_text
from spo.models.library_errors import Origin
from spo.models.loading import load_config, load_tokenizer
from spo.models.same_tokens import check_same_tokens
from spo.rounds import RoundSource
from spo.rounds.source import OF_DATA
from spo.stages.earlier_rewards import with_earlier_rewards
from spo.stages.from_config import build_source, data_needs, make_renderer, model_spec
from spo.stages.pairs import drawn_completions, preference_rows
from spo.stages.reference_model import initial_model, reference_model

_UNFINISHED = "an unfinished completion does not end within data.max_new_tokens; raise it, or sft.max_steps, or "
_MORE_DIFFERENT = "raise iteration.source.temperature or iteration.source.completions"
_REMEDIES = {
    "unfinished": f"{_UNFINISHED}iteration.source.completions",
    "identical": f"samples repeat each other or the data's response; {_MORE_DIFFERENT}",
    "tied": f"the judge scores the completions of a prompt alike; check judge and iteration.source.reward, or "
    f"{_MORE_DIFFERENT}",
}
"""Remedy for each reason for which a round drops pairs."""


@dataclass(frozen=True)
class Prepared:
    """Everything that training and evaluation start from.

    Attributes:
        spec: Settings for loading models.
        base: Folder or hub name of the weights of the reference model.
        start: Folder or hub name of the weights that training starts from: those of the reference, or ``model.start``.
        tokenizer: Tokenizer of the reference model and the policy.
        renderer: Conversion between texts and tokens.
        pairs: Data set as tokens, in splits.
        prompts: Prompts of each split to sample from: those of the source if it names some, else those of the pairs.
            With ``data.num_pairs``, the training prompts are those of the pairs in use.
        bad_rows: Rows that were skipped (``data.on_bad_row=skip``).
        language: All possible responses, ``None`` for data that cannot be enumerated.
        initial: Folder or hub name of the weights before supervised fine-tuning; ``None`` where nothing reads them.
        unlabeled: Prompts to train on without a training pair in use: the further ones that the source names, or else
            those of the pairs that ``data.num_pairs`` leaves out.
    """

    spec: ModelSpec
    base: str
    start: str
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    pairs: PreparedPairs
    prompts: dict[Split, list[EvalPrompt]]
    bad_rows: list[RowError]
    language: Language | None
    unlabeled: Sequence[EvalPrompt] = ()
    initial: str | None = None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a completion, in ascending order."""
        return self.pairs.stop_ids

    def sampling_prompts(
        self, split: Split | Literal["unlabeled"], max_new_tokens: int, limit: int | None = None
    ) -> list[EvalPrompt]:
        """Return prompts of a split, or those without pairs, that leave room for ``max_new_tokens`` in the context.

        Raises:
            DataError: No prompt of the split leaves that room.
        """
        room = self.renderer.max_length - max_new_tokens
        prompts = self.unlabeled if split == "unlabeled" else self.prompts[split]
        fitting = [prompt for prompt in prompts if len(prompt.ids) <= room]
        if prompts and not fitting:
            raise DataError(
                f"none of the {len(prompts)} {split} prompts leaves room for {max_new_tokens} sampled tokens within "
                f"data.max_length={self.renderer.max_length}: set data.max_new_tokens lower"
            )
        return fitting[:limit]


def prepare_run(cfg: DictConfig, model_from: DictConfig | None = None) -> Prepared:
    """Make the reference model and the preference pairs, or find them in the cache.

    Args:
        cfg: Configuration of the run, resolved.
        model_from: Configuration of the run that made the reference model, ``None`` for ``cfg``. An evaluation on
            another data set needs it, since that data set must not lead to another reference model.

    Raises:
        DataError: The data does not fit the configuration.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    # cuDNN builds a plan for each new shape, which takes longer than a step. Here almost every batch has a new shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Fresh weights may depend on the seed of the data.
    model_from = cfg if model_from is None else model_from
    spec = model_spec(model_from)
    source = build_source(cfg)
    if spec.path is not None:
        _check_context(cfg, spec, spec.path)
    of_model = source if model_from is cfg else build_source(model_from)
    base = reference_model(model_from, spec, of_model)
    initial = None
    if INITIAL in extra_references(cfg).values():
        initial = initial_model(model_from, spec)
    tokenizer = spec.tokenizer(base)
    if spec.path is None:
        _check_context(cfg, spec, base)
    stop_ids = spec.stop_ids(base)
    note_stops_in_text(base, stop_ids, tokenizer)
    renderer = make_renderer(cfg, tokenizer, source, stop_ids)
    # The reference model is the same for every method, so it is made before the source knows the loss.
    source.needs = data_needs(cfg)
    rows, dropped = preference_rows(cfg, spec, source, base, renderer)
    draw = partial(drawn_completions, cfg, spec, base, renderer)
    pairs = _prepare_pairs(cfg, source, renderer, rows, dropped, draw)
    if isinstance(source, RoundSource) and source.policies and EARLIER_REWARD in source.needs.features:
        pairs = with_earlier_rewards(
            cfg, spec, tokenizer.pad_token_id, source.policies, pairs, source.earlier_coefficients
        )
    prompts, unlabeled = all_prompts(source, pairs, renderer)
    bad_rows = list(source.bad_rows)
    start = _start(model_from, spec, base, tokenizer)
    return Prepared(
        spec, base, start, tokenizer, renderer, pairs, prompts, bad_rows, source.language, unlabeled, initial
    )


def _start(cfg: DictConfig, spec: ModelSpec, base: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the weights that training starts from.

    Raises:
        UserError: They belong to a model with another vocabulary than the reference.
    """
    # The configuration of an older run does not have the key.
    path = cfg.model.get("start")
    if path is None:
        return base
    origin = Origin(path, "model.start")
    check_same_tokens(origin, load_tokenizer(origin, spec.trust_remote_code), tokenizer, "the start of training")
    return str(path)


def _check_context(cfg: DictConfig, spec: ModelSpec, path: str) -> None:
    config = load_config(spec.origin(path), spec.trust_remote_code)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and cfg.data.max_length > context:
        raise DataError(
            f"data.max_length={cfg.data.max_length} is longer than the model's context of {context} tokens: "
            f"set data.max_length={context} or less"
        )


def _prepare_pairs(
    cfg: DictConfig, source: Source, renderer: Renderer, rows: Sequence[Row], dropped: Mapping[str, int], draw: Draw
) -> PreparedPairs:
    """Return the rows as tokens, in splits; counts and warnings include what the source dropped."""
    # A round source without prompts is that of an evaluation on other data, which does not train.
    in_round = isinstance(source, RoundSource) and source.max_prompts != 0
    if in_round:
        _check_own_pairs(sum(row.split in (None, "train") for row in rows), dropped, cfg.data.min_pairs)
    elif any(dropped.values()) and not any(row.split in (None, "train") for row in rows):
        advice = "sample more completions of each prompt with the keys of data.source"
        if dropped.get("unfinished") == max(dropped.values()):
            advice = f"{_UNFINISHED}sample more with data.source.pairs_per_prompt"
        raise DataError(f"none of the sampled pairs can be used ({_list(dropped)}): {advice}")
    # The pairs of an enumerable language are a complete description, so every split consists of all of them.
    whole = source.language is not None
    selection, test = (0.0, 0.0) if whole else (cfg.data.splits.selection, cfg.data.splits.test)
    source.findings.write_notes()
    lost = sum(dropped.values()) + len(source.bad_rows)
    bad_rows = source.bad_rows if cfg.data.get("on_bad_row") == "skip" else None
    pairs = prepare(
        rows,
        renderer,
        cfg.data.seed,
        selection,
        test,
        cfg.data.min_pairs,
        bad_rows,
        needs=source.needs,
        name_of=source.column_name,
        draw=draw,
        # The configuration of an older run does not have these keys.
        num_pairs=cfg.data.get("num_pairs"),
        subset_seed=cfg.data.get("subset_seed", cfg.seed),
        training_only=in_round,
    )
    if whole:
        counts = pairs.counts | dict.fromkeys(SPLITS, len(pairs.train))
        pairs = dataclasses.replace(pairs, selection=pairs.train, test=pairs.train, counts=counts)
    if unused := source.dropped_responses:
        pairs.warnings.append(f"{sum(unused.values())} responses were dropped from their lists ({_list(unused)})")
    counts = {**pairs.counts, "read": pairs.counts["read"] + lost, "dropped": pairs.counts["dropped"] + lost}
    return dataclasses.replace(pairs, counts=counts)


def _check_own_pairs(number: int, dropped: Mapping[str, int], min_pairs: int) -> None:
    """Check that a round has enough training pairs, since the pairs of its other splits are those of the data.

    Args:
        number: Number of training pairs.
        dropped: Number of pairs that the source dropped, by reason.
        min_pairs: Smallest number of training pairs.

    Raises:
        DataError: There are fewer.
    """
    if number >= min_pairs:
        return
    own = {reason: count for reason, count in dropped.items() if count and not reason.endswith(OF_DATA)}
    is_short_without_drops = number + sum(own.values()) < min_pairs
    advice = []
    # A pairing may count dropped prompts, which would have had several pairs each.
    if own and (not is_short_without_drops or sum(own.values()) > number):
        advice.append(_REMEDIES[max(own, key=own.__getitem__)])
    if is_short_without_drops:
        advice.append("add prompts to the data, or raise iteration.source.prompts if it is set")
    raise DataError(
        f"the round has {number} training pairs, but data.min_pairs={min_pairs} are needed"
        f"{f' ({_list(own)})' if own else ''}: {'; '.join(advice)}{', or set data.min_pairs lower' if number else ''}"
    )


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in counts.items())


def all_prompts(
    source: Source, pairs: PreparedPairs, renderer: Renderer
) -> tuple[dict[Split, list[EvalPrompt]], list[EvalPrompt]]:
    """Return the prompts of each split, and those to train on without a training pair in use.

    Args:
        source: Source of the pairs.
        pairs: Data set as tokens, in splits.
        renderer: Conversion between texts and tokens.
    """
    prompts = {split: _prompts(source, split, pairs, renderer) for split in SPLITS}
    unlabeled = _named(source.unlabeled_prompts(), None, renderer)
    if pairs.left_out:
        prompts["train"] = eval_prompts(pairs.train, "train")
        in_use = {prompt.prompt_id for prompt in prompts["train"]}
        unlabeled = unlabeled or [one for one in eval_prompts(pairs.left_out, None) if one.prompt_id not in in_use]
    return prompts, unlabeled


def _prompts(source: Source, split: Split, pairs: PreparedPairs, renderer: Renderer) -> list[EvalPrompt]:
    """Return the prompts of a split, sorted by id.

    Prompts that the source names are evaluated even if their sampled pairs cannot be used. Whether a pair can be used
    may depend on the last bit of the reference model, and the set of prompts must not.
    """
    texts = source.prompts(split)
    return eval_prompts(getattr(pairs, split), split) if texts is None else _named(texts, split, renderer)


def _named(texts: Sequence[str], split: Split | None, renderer: Renderer) -> list[EvalPrompt]:
    """Return prompts that a source names, sorted by id."""
    named = [EvalPrompt(prompt_id(text), split, renderer.prompt_ids(text), text) for text in texts]
    return sorted({prompt.prompt_id: prompt for prompt in named}.values(), key=lambda prompt: prompt.prompt_id)
