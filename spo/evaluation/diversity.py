"""Diversity of a set of completions, beyond its entropy."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the share of distinct word n-grams in all texts (Li et al., arXiv:1510.03055); 0 without any."""
    grams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_samples(groups: Sequence[Sequence[str]]) -> float:
    """Return the share of distinct texts among the samples of a prompt, averaged over prompts."""
    return fmean(len(set(group)) / len(group) for group in groups)


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean BLEU-4 of each text against all others (Zhu et al., arXiv:1802.01886); high means similar.

    The cost is quadratic in the number of texts, so callers pass a sample.
    """
    from torchmetrics.functional.text import bleu_score  # imported here because it imports torch

    if len(texts) < 2:
        return 0.0
    scores = [bleu_score([text], [[*texts[:i], *texts[i + 1 :]]], smooth=True) for i, text in enumerate(texts)]
    return float(sum(scores) / len(scores))
