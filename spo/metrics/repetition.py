"""Repetition within a text."""

from __future__ import annotations

from collections.abc import Sequence


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Return the share of n-grams that occurred earlier in the sequence (Welleck et al., arXiv:1908.04319).

    Args:
        tokens: Tokens of the sequence.
        n: Length of an n-gram.

    Returns:
        Share in [0, 1]; 0 for a sequence that is too short.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
