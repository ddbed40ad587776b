"""Stored reference log-probs: the store of a run, and the pass that fills it before training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor

from spo.batching import Item, chunks, split_by_tokens
from spo.config.nodes import targets
from spo.data import DataError, TokenizedPair
from spo.data.logps_store import LogpsStore, sequence_key
from spo.errors import memory_for, placed_by
from spo.forward.speed import Speed
from spo.models import PrecomputedReference
from spo.processes import deal, first_decides, gather, rank, world_size
from spo.records.digests import FORWARD_CODE, code_version, digest, model_digest
from spo.records.plugins import plugin_digests
from spo.stages.from_config import eval_device, model_plugins, sharded_dtype, training_numerics
from spo.stages.prepare import Prepared
from spo.types import pad_sequences

log = logging.getLogger(__name__)
CODE_DEPENDENCIES = (
    *FORWARD_CODE,
    "data/collate.py",
    "data/logps_store.py",
    "records/store.py",
    "stages/reference_logps.py",
)
"""Files that a stored log-prob depends on. A change elsewhere in the package leaves it valid."""
Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of a completion."""


def logps_store(cfg: DictConfig, prepared: Prepared, cache_dir: str, speed: Speed, device: torch.device) -> LogpsStore:
    """Return the store of the reference log-probs: a file for everything they depend on except the tokens.

    These are the digests of weights, adapter and tokenizer, the dtype, the attention implementation, the precision,
    the kind of device, the versions of torch and transformers, the layout of a forward pass, and the code. Two
    settings are not part of the key, since they change rounding only: ``speed.max_logits``, and which sequences share
    a forward pass.

    Args:
        cfg: Configuration of the run.
        prepared: Prepared run with the model.
        cache_dir: Folder of the stored log-probs.
        speed: Speed settings with the layout. Before :meth:`Speed.resolve_for` they stand for what the reference model
            supports, which follows from the rest of the key. Resolved settings may leave out more, for the policy.
        device: Device that computes the log-probs.
    """
    spec = prepared.spec
    key = {
        "code": code_version(*CODE_DEPENDENCIES),
        "weights_and_tokenizer": model_digest(prepared.base),
        "adapter": spec.adapter_path and model_digest(spec.adapter_path),
        "plugins": model_plugins(cfg),
        **_reference_plugin(cfg),
        "dtype": spec.dtype,
        "attn_implementation": spec.attn_implementation,
        "precision": cfg.trainer.precision,
        **({"sharded": True} if sharded_dtype(cfg) is not None else {}),
        "device": device.type,
        "versions": [torch.__version__, transformers.__version__],
        "layout": [speed.packing, speed.packing and speed.share_prompts, speed.completion_only],
    }
    dtype = torch.float64 if spec.dtype == "float64" else torch.float32
    return LogpsStore(Path(cache_dir).resolve() / f"{digest(key)[:32]}.sqlite", dtype)


def _reference_plugin(cfg: DictConfig) -> dict[str, Any]:
    """Return code and settings of a reference outside the package, whose weights may be others than the model's."""
    sources = plugin_digests(targets(cfg.reference).values()) if "reference" in cfg else {}
    if not sources:
        return {}
    return {"reference": [sources, OmegaConf.to_container(cfg.reference, resolve=True)]}


def precomputed_logps(cfg: DictConfig, prepared: Prepared, reference: PrecomputedReference) -> dict[str, Tensor]:
    """Return summed reference log-probs of the train and selection pairs, after a pass that stores the missing ones.

    One run at a time makes the pass; the others wait for it and find everything. The processes of a run share the
    batches among them, and the first one reads and writes the store. The pass stores each batch, so an interrupted
    pass resumes where it stopped.

    Args:
        cfg: Configuration of the run.
        prepared: Model and pairs of the run.
        reference: Reference that names the folder of the store; the number of log-probs found there is set on it.

    Returns:
        ``(P, n)`` per split: the completions, best first, with NaN where a list is shorter, and then the further
        completions.

    Raises:
        DataError: Log-probs of the reference are not numbers, or the store cannot be used.
    """
    splits = {"train": prepared.pairs.train, "selection": prepared.pairs.selection}
    rows = list(dict.fromkeys(row for pairs in splits.values() for pair in pairs for row in _rows(pair)))
    keys = [sequence_key(*row) for row in rows]
    requested, device = Speed(**cfg.speed), eval_device(cfg)
    store = logps_store(cfg, prepared, reference.cache_dir, requested, device)
    read = partial(first_decides, partial(store.get, keys))
    unknown = torch.full((len(keys),), torch.nan, dtype=store.dtype)
    known = first_decides(lambda: store.get(keys) if store.file.is_file() else unknown)
    missing = _missing(rows, known)
    # A store that has everything needs no lock, so that it may lie in a folder that cannot be written.
    with _writing(store.file) if missing and rank() == 0 else nullcontext():
        if missing:
            known = read()  # Another run may have made the pass.
            missing = _missing(rows, known)
        if missing:
            if rank() == 0:
                log.info("scoring the pairs with the reference model: %d of %d sequences", len(missing), len(rows))
            model = prepared.spec.start(prepared.base).to(device)
            with (
                training_numerics(cfg, device, model),
                memory_for("scoring pairs with the reference", "reference.batch_tokens", "speed.max_logits"),
            ):
                speed = requested.resolve_for(model)
                fill(store, model, missing, prepared.tokenizer.pad_token_id, speed, reference.batch_tokens)
            known = read()
    if lost := int(known.isnan().sum()):
        raise DataError(
            f"the reference model gives no number (NaN) as the log-probability of {lost} of {len(rows)} sequences: "
            "look at model.path and model.dtype"
        )
    reference.found, reference.computed = len(rows) - len(missing), len(missing)
    logps = dict(zip(rows, known.tolist(), strict=True))
    return {split: _table(pairs, logps, store.dtype) for split, pairs in splits.items() if pairs}


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Hold the lock of a store, which one process at a time fills."""
    with placed_by("set reference.cache_dir", file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            yield


def _missing(rows: Sequence[Row], known: Tensor) -> list[Row]:
    return [rows[i] for i in known.isnan().nonzero().squeeze(-1).tolist()]


@torch.no_grad()
def fill(
    store: LogpsStore, model: Any, rows: Sequence[Row], pad_token_id: int, speed: Speed, batch_tokens: int
) -> None:
    """Compute the log-probs of sequences and store them, batch by batch.

    All processes of the run call this. Each computes every so many batches, and the first one stores what a round of
    them has computed. The batches are those of one process, so the log-probs are the same to the last bit.

    Args:
        store: Store of the log-probs.
        model: Reference model.
        rows: Sequences to score.
        pad_token_id: Token for padding.
        speed: Speed settings, resolved for the model.
        batch_tokens: Limit of tokens in a batch.
    """
    device = next(model.parameters()).device
    rounds = list(chunks(list(cut_into_batches(rows, batch_tokens, speed)), world_size()))
    for batches in track(rounds, "reference log-probs", transient=True, disable=rank() > 0):
        own = []
        for batch in deal(batches):
            sequences = speed.arrange(pad_sequences(batch, pad_token_id)).to(device)
            own.append(speed.logps(model, sequences).cpu())
        logps = torch.cat(gather(own))
        if rank() == 0:
            store.put([sequence_key(*row) for batch in batches for row in batch], logps)


def cut_into_batches(rows: Sequence[Row], batch_tokens: int, speed: Speed) -> Iterator[list[Row]]:
    """Yield sequences in batches of at most ``batch_tokens`` tokens, counted in their layout.

    The completions of a prompt stay together. The longest sequences come first: this leaves little padding, and a
    lack of memory shows at once. After an interruption the rest is cut in the same way.
    """
    completions: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prompt, completion in sorted(rows, key=lambda row: len(row[1]), reverse=True):
        completions.setdefault(prompt, []).append(completion)
    longest = {prompt: len(prompt) + len(found[0]) for prompt, found in completions.items()}

    def packed_tokens(group: list[Row]) -> int:
        prompts = group[:1] if speed.share_prompts else group
        return sum(len(prompt) for prompt, _ in prompts) + sum(len(completion) for _, completion in group)

    groups: list[list[Row]] = []
    items: list[Item] = []
    for prompt in sorted(completions, key=longest.__getitem__, reverse=True):
        for part in chunks(completions[prompt], max(batch_tokens // longest[prompt], 1)):
            group = [(prompt, completion) for completion in part]
            groups.append(group)
            items.append((1, packed_tokens(group)) if speed.packing else (longest[prompt], len(group)))
    for batch in split_by_tokens(items, max_tokens=batch_tokens):
        yield list(chain.from_iterable(groups[batch]))


def _rows(pair: TokenizedPair) -> list[Row]:
    return [(pair.prompt_ids, completion) for completion in pair.sequences]


def _table(pairs: Sequence[TokenizedPair], logps: dict[Row, float], dtype: torch.dtype) -> Tensor:
    def scores(pair: TokenizedPair, completions: Iterable[tuple[int, ...]]) -> list[float]:
        return [logps[pair.prompt_ids, completion] for completion in completions]

    longest = max(len(pair.completions) for pair in pairs)
    # Nothing reads the padding. NaN would reveal code that does.
    padding = [[torch.nan] * (longest - len(pair.completions)) for pair in pairs]
    table = [
        scores(pair, pair.completions) + missing + scores(pair, pair.extra.values())
        for pair, missing in zip(pairs, padding, strict=True)
    ]
    return torch.tensor(table, dtype=dtype)
