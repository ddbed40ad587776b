"""Tokenized splits from rows, with counts and warnings for a person to read before training starts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from spo.data.findings import Findings
from spo.data.messages import message_text
from spo.data.needs import (
    Draw,
    SplitRows,
    as_labelled,
    check_kind,
    further_completions,
    make_features,
    needs_pairs,
    read_features,
)
from spo.data.rendering import TRUNCATIONS, Dropped, Renderer, TokenizedPair, prompt_id
from spo.data.rows import SPLITS, DataError, Message, Row, RowError, Split, Text
from spo.notes import note

if TYPE_CHECKING:
    from spo.losses import DataNeeds

REPORTED_COUNTS = ("read", "used", "left_out", "dropped", "truncated")
"""Counts of pairs in the panel at the start and in ``metrics.json``, where they were counted."""


@dataclass(frozen=True)
class PreparedPairs:
    """The pairs, lists or labelled completions of each split.

    Attributes:
        train: Pairs to train on.
        selection: Pairs to choose checkpoints and settings by.
        test: Pairs of the final evaluation.
        counts: Numbers of pairs: ``read``, ``used``, ``dropped`` and each ``dropped/REASON``, the used ones that are
            ``truncated`` or have ``boundary_moved``, and the size of each split. With ``data.num_pairs``, ``left_out``
            is the number of training pairs that are not in use. A pair that a loss reads as two labelled completions
            counts as one, but twice in the size of its split.
        warnings: Messages for the person who starts the run.
        stop_ids: Tokens that end a completion, in ascending order: those of the renderer, and the last token of every
            completion that was not cut.
        left_out: Training pairs that are not in use, as rows of the data.
        rows: Pairs of each split as rows of the data, without what the loss reads besides and before it reads a pair
            as two labelled completions. They are the same for all methods.
    """

    train: list[TokenizedPair]
    selection: list[TokenizedPair]
    test: list[TokenizedPair]
    counts: dict[str, int]
    warnings: list[str]
    stop_ids: tuple[int, ...] = ()
    left_out: Sequence[TokenizedPair] = ()
    rows: Mapping[str, Sequence[TokenizedPair]] = field(default_factory=dict)

    @property
    def reported_counts(self) -> dict[str, int]:
        """Return the counts of :data:`REPORTED_COUNTS`, by name."""
        return {key: self.counts[key] for key in REPORTED_COUNTS if key in self.counts}


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt to sample from.

    Attributes:
        prompt_id: Digest of the prompt.
        split: Split of its pair, or ``None``.
        ids: Tokens of the prompt, the same as in training.
        text: Text of the prompt, for a conversation with what the chat template writes.
        messages: Messages of the prompt; empty for a text prompt.
    """

    prompt_id: str
    split: Split | None
    ids: tuple[int, ...]
    text: str
    messages: tuple[Message, ...] = ()


def prepare(
    rows: Sequence[Row],
    renderer: Renderer,
    seed: int,
    selection: float,
    test: float,
    min_pairs: int,
    bad_rows: list[RowError] | None = None,
    *,
    needs: DataNeeds | None = None,
    name_of: Callable[[str], str] = str,
    draw: Draw | None = None,
    num_pairs: int | None = None,
    subset_seed: int = 0,
    training_only: bool = False,
) -> PreparedPairs:
    """Tokenize the rows and split them by prompt.

    The split of a prompt depends on the seed and the prompt only. It is the same for every tokenizer, truncation policy
    and order of rows, except for tiny data: a split that would be empty gets a prompt of the largest one. Prompts that
    differ only in white space, or in fields beside the text of their messages, are in the same split.

    Splits that the source assigns are kept. A split that it does not assign is taken from its training rows. If the
    source has a prompt in several splits, only the pairs in the last of train, selection and test are used.

    Args:
        rows: Rows to tokenize.
        renderer: Renderer that converts rows to tokens.
        seed: Random seed of the split.
        selection: Share of the prompts for the selection split; 0 for none, otherwise at least one prompt.
        test: Share of the prompts for the test split; 0 for none, otherwise at least one prompt.
        min_pairs: Smallest number of pairs that must be left.
        bad_rows: List that gets the errors of rows that cannot be used; ``None`` raises the first one.
        needs: What the loss asks of the data; ``None`` for the rows as they are.
        name_of: Function from the name of a column to its name in the data, for messages.
        draw: Function that draws further completions from the reference model; ``None`` where there is no model.
        num_pairs: Number of training pairs in use, see :func:`draw_subset`; ``None`` for all. The pairs of the other
            splits stay as they are.
        subset_seed: Random seed of the training pairs in use.
        training_only: True to apply ``min_pairs`` to the training pairs alone, for a source that assigns all splits.

    Raises:
        DataError: If fewer than ``min_pairs`` (training) pairs are left, if there are fewer than ``num_pairs`` training
            pairs, if there are too few prompts for the splits, or if a further completion that the loss declares cannot
            be made.
        RowError: If the renderer or the loss cannot use a row.
    """
    if not (selection >= 0 and test >= 0 and selection + test < 1):
        raise DataError(
            f"data.splits: selection={selection}, test={test}: shares must be at least 0 and leave prompts to train"
        )
    if needs is not None and not needs_pairs(needs):
        rows = _without_some_rejected(rows)
    used: list[TokenizedPair] = []
    reasons: Counter[str] = Counter()
    for row in rows:
        try:
            result = _tokenized(row, renderer, needs, name_of)
        except RowError as error:
            if bad_rows is None:
                raise
            bad_rows.append(error)
            result = Dropped("bad_row", row.where)
        if isinstance(result, Dropped):
            reasons[result.reason] += 1
        else:
            used.append(result)
    for key, sentence, count in renderer.notes():
        note(key, sentence, count)

    findings = Findings()
    group_of = _group_prompts(rows, findings)
    findings.write_notes()
    given = _find_source_splits((group_of[pair.prompt_id], pair.split) for pair in used)
    groups = [group_of[pair.prompt_id] for pair in used]
    split_of = _assign_splits(groups, given, seed, {"selection": selection, "test": test})
    kept = [pair for pair in used if pair.split in (None, given.get(group_of[pair.prompt_id]))]
    if overlap := len(used) - len(kept):
        reasons["prompt_in_other_split"] = overlap
    parts: dict[str, list[TokenizedPair]] = {
        split: [pair for pair in kept if split_of[group_of[pair.prompt_id]] == split] for split in SPLITS
    }
    ends = {ids[-1] for pair in kept if not pair.truncated for ids in pair.sequences}
    stop_ids = tuple(sorted({*renderer.stop_ids, *ends}))
    left_out: list[TokenizedPair] = []
    if num_pairs is not None:
        # Before the loss reads the rows, so that it does not make further completions of rows that are not in use.
        parts["train"], left_out = draw_subset(parts["train"], num_pairs, subset_seed)
    data = dict(parts)
    if needs is not None:
        for split, pairs in parts.items():
            data[split], parts[split] = _as_loss_reads(
                pairs, needs, renderer, SplitRows((), stop_ids, draw, renderer.encode_like), split
            )
            if too_long := len(pairs) - len(data[split]):
                reasons["too_long"] += too_long
                lost = set(map(id, pairs)) - set(map(id, data[split]))
                kept = [pair for pair in kept if id(pair) not in lost]
    others = set(map(id, left_out))
    in_use = [pair for pair in kept if id(pair) not in others]
    counts: dict[str, int] = {
        "read": len(rows),
        "used": len(in_use),
        **({} if num_pairs is None else {"left_out": len(left_out)}),
        "dropped": len(rows) - len(kept),
        **{f"dropped/{reason}": n for reason, n in sorted(reasons.items())},
        "truncated": sum(pair.truncated for pair in in_use),
        "boundary_moved": sum(pair.boundary_moved for pair in in_use),
        **{split: len(pairs) for split, pairs in parts.items()},
    }
    if training_only and (left := len(data["train"]) + len(left_out)) < min_pairs:
        raise DataError(
            f"only {left} of {sum(row.split == 'train' for row in rows)} training pairs are left, but data.min_pairs="
            f"{min_pairs} are needed; dropped from all splits{_explain_drops(reasons, renderer)}"
        )
    if len(kept) < min_pairs:
        raise DataError(
            f"only {len(kept)} of {len(rows)} pairs are left, but data.min_pairs={min_pairs} are needed"
            f"{_explain_drops(reasons, renderer)}"
        )
    for split, share in (("train", 1.0), ("selection", selection), ("test", test)):
        if share > 0 and not parts[split]:
            raise DataError(
                f"no pair is left for the {split} split: the {len(kept)} pairs have {len(split_of)} prompts, and a "
                "prompt is never in two splits. Add prompts, or set smaller shares in data.splits"
            )
    warnings = []
    if repeated := sum(pair.repeated for pair in kept):
        warnings.append(f"{repeated} responses were dropped from their lists: a better one has the same tokens")
    if len(kept) < len(rows) / 2:
        warnings.append(f"{len(rows) - len(kept)} of {len(rows)} pairs were dropped{_explain_drops(reasons, renderer)}")
    plain: dict[str, Sequence[TokenizedPair]] = {
        split: [replace(pair, features={}, numbers={}, extra={}) for pair in data[split]] for split in SPLITS
    }
    return PreparedPairs(**parts, counts=counts, warnings=warnings, stop_ids=stop_ids, left_out=left_out, rows=plain)


def draw_subset(
    pairs: Sequence[TokenizedPair], number: int, seed: int
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Draw a random subset of the pairs of a split.

    Each pair has a hash of the seed, its prompt and its completions in any order, and the pairs with the smallest
    hashes are drawn. The subsets of one seed are therefore nested. They do not depend on the order of the rows, or on
    which of the completions is the better one.

    Args:
        pairs: Pairs, ranked lists or labelled completions.
        number: Number of pairs to draw.
        seed: Random seed of the subset.

    Returns:
        The pairs in the subset and the others, both in their order.

    Raises:
        DataError: If there are fewer pairs.
    """
    if number > len(pairs):
        raise DataError(
            f"data.num_pairs={number}: there are {len(pairs)} training pairs; set it to {len(pairs)} or less, or to "
            "null for all of them"
        )
    seen: Counter[str] = Counter()
    places: list[float] = []
    for pair in pairs:
        text = json.dumps([pair.prompt_id, *sorted(pair.texts)])
        # Rows of the same completions, such as labels of several people, are drawn independently.
        places.append(_hash_fraction(seed, f"subset {seen[text]} {text}"))
        seen[text] += 1
    order = sorted(range(len(pairs)), key=places.__getitem__)
    drawn, others = sorted(order[:number]), sorted(order[number:])
    return [pairs[i] for i in drawn], [pairs[i] for i in others]


def _without_some_rejected(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows without rejected completions if some of them do not have one, since all batches are alike."""
    alone = [row for row in rows if row.rejected is None]
    if not alone or len(alone) == len(rows):
        return rows
    findings = Findings()
    findings.add("missing_rejected", alone[0].where, len(alone))
    findings.write_notes()
    return [replace(row, rejected=None, worse=()) for row in rows]


def _tokenized(
    row: Row, renderer: Renderer, needs: DataNeeds | None, name_of: Callable[[str], str]
) -> TokenizedPair | Dropped:
    """Return a row as tokens, with the numbers and texts that the loss reads, or the reason why it was dropped."""
    if needs is None:
        return renderer.render(row)
    check_kind(row, needs)
    features, numbers = read_features(needs.features, row, name_of)
    pair = renderer.render(row, needs.text_columns, name_of, numbers)
    return pair if isinstance(pair, Dropped) else replace(pair, features=features)


def _as_loss_reads(
    pairs: Sequence[TokenizedPair], needs: DataNeeds, renderer: Renderer, split_rows: SplitRows, split: str
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """Return the pairs of a split that fit the length limit with their further completions, and their rows.

    A pair is one row, or two for a loss of labelled completions. It fits if all of its rows do.
    """
    whole_rows = make_features(needs.features, pairs, split)
    rows_of = [as_labelled(pair) if needs.labelled else [pair] for pair in whole_rows]
    flat = replace(split_rows, rows=[row for rows in rows_of for row in rows])
    made = iter([renderer.fit(row) for row in further_completions(needs, flat, split)])
    fitting: list[TokenizedPair] = []
    result: list[TokenizedPair] = []
    for pair, rows in zip(pairs, rows_of, strict=True):
        whole = [row for row in (next(made) for _ in rows) if isinstance(row, TokenizedPair)]
        if len(whole) == len(rows):
            fitting.append(pair)
            result += whole
    return fitting, result


def eval_prompts(pairs: Sequence[TokenizedPair], split: Split | None) -> list[EvalPrompt]:
    """Return each prompt of ``pairs`` once, in the order of their digests, so that the first few are a fair sample.

    Args:
        pairs: Pairs of a split.
        split: Split of the pairs. It is that of the pairs themselves only where the source assigns splits.
    """
    first: dict[str, TokenizedPair] = {}
    for pair in pairs:
        first.setdefault(pair.prompt_id, pair)
    # Digests are as good as random, so this order is independent of the order in the file.
    chosen = [first[key] for key in sorted(first)]
    return [
        EvalPrompt(pair.prompt_id, split, pair.prompt_ids, pair.prompt_text, pair.prompt_messages) for pair in chosen
    ]


def split_rows(rows: Sequence[Row], seed: int, selection: float, test: float) -> list[Row]:
    """Return the rows with the split that :func:`prepare` gives to their prompts, before they are tokens.

    Args:
        rows: Rows of a source.
        seed: Random seed of the split.
        selection: Share of the prompts for the selection split.
        test: Share of the prompts for the test split.
    """
    group_of = _group_prompts(rows, Findings())
    groups = [group_of[row_id(row)] for row in rows]
    given = _find_source_splits(zip(groups, (row.split for row in rows), strict=True))
    split_of = _assign_splits(groups, given, seed, {"selection": selection, "test": test})
    return [replace(row, split=split_of[group]) for row, group in zip(rows, groups, strict=True)]


def row_id(row: Row) -> str:
    """Return the digest of the prompt of a row, with its tools and arguments of the chat template."""
    return prompt_id(row.prompt, row.tools, row.template_kwargs)


def _group_prompts(rows: Sequence[Row], findings: Findings) -> dict[str, str]:
    """Return the group of each prompt: the smallest digest among the prompts of the same words."""
    words_of: dict[str, str] = {}
    smallest: dict[str, str] = {}
    for row in rows:
        prompt = row_id(row)
        if prompt in words_of:
            continue
        words = words_of[prompt] = prompt_id(_words(row.prompt))
        if words in smallest:
            findings.add("similar_prompts", row.where)
        smallest[words] = min(prompt, smallest.get(words, prompt))
    return {prompt: smallest[words] for prompt, words in words_of.items()}


def _words(prompt: Text) -> str:
    """Return the words of a prompt, with the roles of its messages, without differences in white space."""
    if isinstance(prompt, str):
        return " ".join(prompt.split())
    return "\n".join(f"{message['role']}: {' '.join(message_text(message).split())}" for message in prompt)


def _find_source_splits(splits: Iterable[tuple[str, Split | None]]) -> dict[str, Split]:
    """Return the split that the source assigns to each group, the last of :data:`SPLITS` if it assigns several.

    Args:
        splits: Group and split of each row; ``None`` where the source does not assign one.
    """
    given: dict[str, Split] = {}
    for group, split in splits:
        if split is not None:
            # The last split wins, so that a prompt of the test split is never trained on.
            given[group] = max(given.get(group, "train"), split, key=SPLITS.index)
    return given


def _assign_splits(
    groups: Sequence[str], given: Mapping[str, Split], seed: int, shares: Mapping[Split, float]
) -> dict[str, Split]:
    """Return the split of each group of prompts, from the source or from the hash of the group."""
    # Only splits that the source does not have are cut out of its training prompts.
    supplied = set(given.values())
    shares = {split: share for split, share in shares.items() if split not in supplied and share > 0}
    fractions = {
        group: _hash_fraction(seed, group) for group in dict.fromkeys(groups) if given.get(group, "train") == "train"
    }
    free: dict[str, Split] = {}
    for prompt, fraction in fractions.items():
        free[prompt], low = "train", 0.0
        for split, share in shares.items():
            if low <= fraction < low + share:
                free[prompt] = split
            low += share
    # With tiny data, no hash may fall into a split. The largest split then gives it a prompt.
    for split in (*shares, SPLITS[0]):
        [(largest, size)] = Counter(free.values()).most_common(1) or [(split, 0)]
        if split not in free.values() and size > 1:
            free[min((prompt for prompt in free if free[prompt] == largest), key=fractions.__getitem__)] = split
    return {**given, **free}


def _hash_fraction(seed: int, prompt: str) -> float:
    """Return a number in [0, 1) that the seed and the digest of a prompt determine."""
    # A hash instead of a shuffle: prompts stay in their splits when rows are added or the file is reordered.
    digest = hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _explain_drops(reasons: Counter[str], renderer: Renderer) -> str:
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
