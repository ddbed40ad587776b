"""How varied a set of completions is, beyond its entropy."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of distinct word n-grams among all n-grams of all texts (Li et al., arXiv:1510.03055); 0 where none are."""
    grams = [gram for text in texts for gram in zip(*(text.split()[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_samples(groups: Sequence[Sequence[str]]) -> float:
    """Share of distinct texts among the samples of one prompt, a mean over the prompts."""
    return fmean(len(set(group)) / len(group) for group in groups)


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU-4 of each text against all the others (Zhu et al., arXiv:1802.01886): high means alike.

    Its cost is quadratic in the number of texts; callers pass a sample.
    """
    from torchmetrics.functional.text import bleu_score  # torch comes with it

    if len(texts) < 2:
        return 0.0
    scores = [bleu_score([text], [[*texts[:i], *texts[i + 1 :]]], smooth=True) for i, text in enumerate(texts)]
    return float(sum(scores) / len(scores))
