"""Files that look like published preference data: our own random words, with the same statistics of length.

The quantiles below are of characters, measured on AlpacaEval's pairs and on HH-RLHF (harmless-base).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.random import Generator

_LEVELS = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_ALPACA = {
    "prompt": (12, 25, 31, 40, 60, 100, 176, 315, 516, 1000, 1917),
    "chosen": (2, 93, 201, 380, 1045, 2104, 2892, 3479, 3827, 5164, 9631),
    "rejected": (1, 32, 93, 168, 495, 1237, 1866, 2723, 3191, 4461, 12720),
}
_HH = {
    "prompt": (29, 40, 52, 70, 120, 353, 649, 1090, 1386, 2000, 3498),
    "chosen": (2, 10, 20, 30, 57, 112, 229, 390, 515, 800, 1077),
    "rejected": (3, 11, 22, 35, 70, 143, 282, 463, 635, 1000, 2470),
}
_HH_TURNS = (0.29, 0.54, 0.79, 0.94, 0.97, 0.98, 0.99, 1.0)
_ONSETS = ("b", "d", "h", "l", "m", "n", "s", "t", "w", "th", "sh", "st", "")
_VOWELS = ("a", "e", "i", "o", "ou", "e", "a")
_CODAS = ("", "", "n", "r", "nd", "t", "l", "ng", "d")
_WORDS = 4000


def write_alpaca_like(path: Path, prompts: int, seed: int) -> Path:
    """Four pairs of each prompt as jsonl.gz with ``prompt``, ``chosen``, ``rejected`` and ``preference``.

    About one row in a hundred has an empty completion or two equal ones, as the published file has.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(prompts):
        prompt = _text(rng, _length(rng, _ALPACA["prompt"])) + "?"
        for _ in range(4):
            chosen, rejected = _pair(rng, _ALPACA, correlation=0.7)
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            odd = rng.random()
            if odd < 0.01:
                row["rejected"] = "" if odd < 0.007 else chosen
            rows.append({**row, "preference": float(1 - 0.5 * rng.random() ** 6), "dataset": "made_up"})
    return _write(path, rows)


def write_ranked_like(path: Path, prompts: int, seed: int) -> Path:
    """Write lists of nine responses as jsonl.gz with ``prompt``, ``responses`` and ``scores``, best first.

    As in the published file a few responses are empty or repeated, and a few scores are equal.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(prompts):
        responses = [_text(rng, _length(rng, _ALPACA["chosen"])) for _ in range(9)]
        scores = sorted(rng.random(9).round(2).tolist(), reverse=True)
        odd = rng.random()
        if odd < 0.06:
            responses[7] = "" if odd < 0.03 else responses[2]
        rows.append(
            {"prompt": _text(rng, _length(rng, _ALPACA["prompt"])) + "?", "responses": responses, "scores": scores}
        )
    return _write(path, rows)


def write_hh_like(path: Path, pairs: int, seed: int) -> Path:
    """Transcripts of one to eight turns as jsonl.gz with ``chosen`` and ``rejected`` only."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(pairs):
        place = rng.random()
        turns = 1 + int(np.searchsorted(_HH_TURNS, place))
        share = max(4, int(np.interp(place, _LEVELS, _HH["prompt"])) // (2 * turns - 1) - 12)
        prompt = "".join(
            f"\n\nHuman: {_text(rng, share)}?\n\nAssistant:" + (f" {_text(rng, share)}." if turn < turns - 1 else "")
            for turn in range(turns)
        )
        chosen, rejected = _pair(rng, _HH, correlation=0.3)
        if rng.random() < 0.003:
            chosen = ""
        rows.append({"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"})
    return _write(path, rows)


def _pair(rng: Generator, quantiles: Mapping[str, tuple[int, ...]], correlation: float) -> tuple[str, str]:
    """Two different texts whose lengths are correlated as the published ones are."""
    first, second = rng.standard_normal(2)
    second = correlation * first + (1 - correlation**2) ** 0.5 * second
    uniform = [NormalDist().cdf(float(value)) for value in (first, second)]
    chosen, rejected = (
        _text(rng, int(np.interp(u, _LEVELS, quantiles[side])))
        for u, side in zip(uniform, ("chosen", "rejected"), strict=True)
    )
    return chosen, rejected if rejected != chosen else rejected + "!"


def _length(rng: Generator, quantiles: tuple[int, ...]) -> int:
    return int(np.interp(rng.random(), _LEVELS, quantiles))


def _text(rng: Generator, characters: int) -> str:
    """About that many characters of made-up words, with capitals, full stops and now and then a list."""
    words: list[str] = []
    size = 0
    picks = rng.integers(_WORDS, size=characters // 2 + 1)
    ends = rng.random(size=len(picks))
    for pick, end in zip(picks, ends, strict=True):
        word = _words()[pick]
        word = word.capitalize() if not words or words[-1].endswith((".", "*")) else word
        words.append(word + (".\n\n*" if end < 0.02 else "." if end < 0.1 else "," if end < 0.15 else ""))
        size += len(words[-1]) + 1
        if size >= characters:
            break
    return " ".join(words)[: max(1, characters)].strip() or "ok"


@cache
def _words() -> list[str]:
    rng = np.random.default_rng(0)

    def syllable() -> str:
        return "".join(parts[int(rng.integers(len(parts)))] for parts in (_ONSETS, _VOWELS, _CODAS))

    return ["".join(syllable() for _ in range(rng.choice((1, 1, 2, 2, 3)))) for _ in range(_WORDS)]


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No time stamp in the file, so that equal rows make equal bytes.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as stream:
        for row in rows:
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return path
