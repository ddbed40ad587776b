"""Lengths of the pairs of HH in tokens, and pairs of random tokens that have these lengths.

Usage: ``python -m benchmarks.hh_lengths`` writes ``benchmarks/hh_lengths.json`` again from the published pairs.

A benchmark on a machine without the data set draws its pairs from the file. It holds the lengths of 512 pairs, evenly
spaced in the order of all pairs by their total length, so that it keeps the joint distribution of prompt, chosen and
rejected lengths.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.workloads import FILES, MAX_LENGTH, VOCABULARY, Data, data_dir, train_tokenizer
from spo.data import Renderer, TokenizedPair
from spo.data.splits import prepare

FILE = Path(__file__).with_suffix(".json")
STORED_PAIRS = 512
SPECIAL_TOKENS = 3
"""The ids below this number are BOS, EOS and PAD, which random text does not contain."""
Lengths = tuple[int, int, int]


def stored_lengths() -> list[Lengths]:
    """Return the stored ``(prompt, chosen, rejected)`` lengths in tokens, the shortest pair first."""
    return [(prompt, chosen, rejected) for prompt, chosen, rejected in json.loads(FILE.read_text())["lengths"]]


def random_pairs(number: int, vocabulary: int, seed: int) -> list[TokenizedPair]:
    """Draw pairs of random tokens whose lengths are those of pairs of HH.

    Args:
        number: Number of pairs.
        vocabulary: Number of token ids of the model.
        seed: Random seed of the lengths and of the tokens.
    """
    rng, lengths = random.Random(seed), stored_lengths()

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(SPECIAL_TOKENS, vocabulary), k=length))

    pairs = []
    for i in range(number):
        prompt, chosen, rejected = map(tokens, rng.choice(lengths))
        pairs.append(TokenizedPair(prompt, chosen, rejected, "", "", "", prompt_id=str(i)))
    return pairs


def measured_lengths(data: Data) -> list[Lengths]:
    """Tokenize a data set as the step benchmarks do, and return the lengths of its pairs."""
    renderer = Renderer(train_tokenizer(data.texts(), VOCABULARY), MAX_LENGTH, "drop_pair", False)
    pairs = prepare(data.rows(), renderer, seed=0, selection=0.0, test=0.0, min_pairs=1).train
    return [(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids or ())) for pair in pairs]


def evenly_spaced(lengths: Sequence[Lengths], number: int) -> list[Lengths]:
    """Return the lengths in the middle of ``number`` equal parts of the pairs, ordered by total length."""
    ordered = sorted(lengths, key=lambda one: (sum(one), one))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * number)] for i in range(number)]


def means(lengths: Sequence[Lengths]) -> list[float]:
    """Return the mean prompt, chosen and rejected lengths."""
    return [round(sum(column) / len(lengths), 1) for column in zip(*lengths, strict=True)]


def describe(lengths: Sequence[Lengths]) -> dict[str, Any]:
    """Return what the file holds for the lengths of all pairs."""
    kept = evenly_spaced(lengths, STORED_PAIRS)
    return {
        "about": (
            f"Lengths in tokens of {STORED_PAIRS} pairs of {FILES['hh']}, evenly spaced in the order of the total "
            f"length of its {len(lengths)} pairs of at most {MAX_LENGTH} tokens. BOS and EOS count. The tokenizer is "
            f"a byte-level BPE of {VOCABULARY} tokens, trained on the text of the file."
        ),
        "made_by": "python -m benchmarks.hh_lengths",
        "columns": ["prompt", "chosen", "rejected"],
        "means_of_all_pairs": means(lengths),
        "means": means(kept),
        "lengths": kept,
    }


def main() -> None:
    """Write the file of lengths."""
    assert __doc__ is not None
    argparse.ArgumentParser("python -m benchmarks.hh_lengths", description=__doc__.split("\n")[0]).parse_args()
    entries = describe(measured_lengths(Data("hh", data_dir() / FILES["hh"])))
    lengths = ", ".join(json.dumps(one) for one in entries.pop("lengths"))
    FILE.write_text(json.dumps(entries, indent=2).removesuffix("\n}") + f',\n  "lengths": [{lengths}]\n}}\n')
    print(f"{FILE}: mean lengths {entries['means']}, of all pairs {entries['means_of_all_pairs']}")


if __name__ == "__main__":
    main()
