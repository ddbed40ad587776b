"""From rows to tokenised splits, with the numbers a person wants to see before training starts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spo.data.rendering import TRUNCATIONS, Dropped, Renderer, TokenizedPair
from spo.data.rows import SPLITS, DataError, Row, Split

REPORTED_COUNTS = ("read", "used", "dropped", "truncated")
"""Counts of pairs in the panel at the start and in ``metrics.json``."""


@dataclass(frozen=True)
class PreparedPairs:
    """The pairs of each split.

    Attributes:
        train: pairs to learn from.
        selection: pairs to choose checkpoints and settings by.
        test: pairs of the final evaluation.
        counts: ``read``, ``used``, ``dropped`` and each ``dropped/REASON``, ``truncated``, ``boundary_moved``, and the
            pairs of each split; all in pairs, ``truncated`` and ``boundary_moved`` among those used.
        warnings: what a person should know, in words.
    """

    train: list[TokenizedPair]
    selection: list[TokenizedPair]
    test: list[TokenizedPair]
    counts: dict[str, int]
    warnings: list[str]


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt to sample from.

    Attributes:
        prompt_id: digest of the prompt.
        split: where it comes from.
        ids: its tokens, the same that training saw.
        text: its text.
    """

    prompt_id: str
    split: Split | None
    ids: tuple[int, ...]
    text: str


def prepare(
    rows: Sequence[Row], renderer: Renderer, seed: int, selection: float, test: float, min_pairs: int
) -> PreparedPairs:
    """Tokenises the rows and splits them by prompt.

    A prompt's split depends on the seed and the prompt alone, so it is the same for every tokenizer, truncation policy
    and order of rows (but for data so small that a split would be empty, which then gets a prompt of the largest).
    Splits that the source assigns are kept; one that it does not assign is taken from its train part. Of a prompt that
    the source has in several splits, only the pairs in the last of train, selection and test are used.

    Args:
        rows: the rows.
        renderer: makes the tokens.
        seed: of the split.
        selection: share of the prompts that becomes the selection split; 0 for none, else at least one prompt.
        test: share of the prompts that becomes the test split; 0 for none, else at least one prompt.
        min_pairs: fewest pairs to go on with.

    Raises:
        DataError: when fewer than ``min_pairs`` pairs are left, or too few prompts for the splits.
        RowError: from the renderer.
    """
    if not (selection >= 0 and test >= 0 and selection + test < 1):
        raise DataError(
            f"data.splits: selection={selection}, test={test}: shares of the prompts that leave some to train"
        )
    used: list[TokenizedPair] = []
    reasons: Counter[str] = Counter()
    for row in rows:
        result = renderer.render(row)
        if isinstance(result, Dropped):
            reasons[result.reason] += 1
        else:
            used.append(result)

    given = _given(used)
    split_of = _assign(used, given, seed, {"selection": selection, "test": test})
    kept = [pair for pair in used if pair.split in (None, given.get(pair.prompt_id))]
    if overlap := len(used) - len(kept):
        reasons["prompt_in_other_split"] = overlap
    parts: dict[str, list[TokenizedPair]] = {
        split: [pair for pair in kept if split_of[pair.prompt_id] == split] for split in SPLITS
    }
    counts: dict[str, int] = {
        "read": len(rows),
        "used": len(kept),
        "dropped": len(rows) - len(kept),
        **{f"dropped/{reason}": n for reason, n in sorted(reasons.items())},
        "truncated": sum(pair.truncated for pair in kept),
        "boundary_moved": sum(pair.boundary_moved for pair in kept),
        **{split: len(pairs) for split, pairs in parts.items()},
    }
    if len(kept) < min_pairs:
        raise DataError(
            f"only {len(kept)} of {len(rows)} pairs are left, and data.min_pairs={min_pairs} are needed"
            f"{_explained(reasons, renderer)}"
        )
    for split, share in (("train", 1.0), ("selection", selection), ("test", test)):
        if share > 0 and not parts[split]:
            raise DataError(
                f"no pair is left for the {split} split: the {len(kept)} pairs have {len(split_of)} prompts, and a "
                "prompt is never in two splits. Give more prompts, or smaller shares in data.splits"
            )
    warnings = []
    if repeated := sum(pair.repeated for pair in kept):
        warnings.append(f"{repeated} responses were left out of their lists: a better one has the same tokens")
    if len(kept) < len(rows) / 2:
        warnings.append(f"{len(rows) - len(kept)} of {len(rows)} pairs were dropped{_explained(reasons, renderer)}")
    return PreparedPairs(parts["train"], parts["selection"], parts["test"], counts, warnings)


def eval_prompts(pairs: Sequence[TokenizedPair]) -> list[EvalPrompt]:
    """Each prompt of ``pairs`` once, in the order of their digests, so that the first few are a fair sample."""
    first: dict[str, TokenizedPair] = {}
    for pair in pairs:
        first.setdefault(pair.prompt_id, pair)
    chosen = [first[key] for key in sorted(first)]
    return [EvalPrompt(pair.prompt_id, pair.split, pair.prompt_ids, pair.prompt_text) for pair in chosen]


def _given(pairs: Sequence[TokenizedPair]) -> dict[str, Split]:
    """The split that the source assigns to each prompt, the last of `SPLITS` where it assigns several."""
    given: dict[str, Split] = {}
    for pair in pairs:
        if pair.split is not None:
            given[pair.prompt_id] = max(given.get(pair.prompt_id, "train"), pair.split, key=SPLITS.index)
    return given


def _assign(
    pairs: Sequence[TokenizedPair], given: Mapping[str, Split], seed: int, shares: Mapping[Split, float]
) -> dict[str, Split]:
    """The split of each prompt."""
    supplied = set(given.values())
    shares = {split: share for split, share in shares.items() if split not in supplied and share > 0}
    place = {
        pair.prompt_id: _place(seed, pair.prompt_id) for pair in pairs if given.get(pair.prompt_id, "train") == "train"
    }
    free: dict[str, Split] = {}
    for prompt, at in place.items():
        free[prompt], low = "train", 0.0
        for split, share in shares.items():
            if low <= at < low + share:
                free[prompt] = split
            low += share
    # Hashes can leave a split of tiny data empty; the largest one then gives it a prompt.
    for split in (*shares, SPLITS[0]):
        [(largest, size)] = Counter(free.values()).most_common(1) or [(split, 0)]
        if split not in free.values() and size > 1:
            free[min((prompt for prompt in free if free[prompt] == largest), key=place.__getitem__)] = split
    return {**given, **free}


def _place(seed: int, prompt: str) -> float:
    digest = hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _explained(reasons: Counter[str], renderer: Renderer) -> str:
    if not reasons:
        return ""
    text = " (" + ", ".join(f"{reason.replace('_', ' ')}: {n}" for reason, n in reasons.most_common()) + ")"
    if any(reason.endswith("too_long") for reason in reasons):
        others = " or ".join(f"data.truncation={policy}" for policy in TRUNCATIONS if policy != renderer.truncation)
        text += (
            f". The limit is {renderer.max_length} tokens and data.truncation={renderer.truncation}; "
            f"try {others}, or a model with a longer context"
        )
    return text
