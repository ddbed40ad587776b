"""Key phrases of a text by RAKE (Rose et al., 2010), and texts without some of them."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict

_COMMON = """
    a about above after again against all also am an and any are as at be because been before being below between both
    but by can could did do does doing done down during each either even ever every few for from further get gets got
    had has have having he her here hers herself him himself his how however i if in into is it its itself just let may
    me might more most much must my myself neither no nor not now of off often on once one only onto or other our ours
    ourselves out over own perhaps please quite rather really same shall she should since so some such than that the
    their theirs them themselves then there these they this those though through thus to too toward under until up upon
    us very was we well were what when where whether which while who whom whose why will with within without would yes
    yet you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_COMMON.split())
"""Common English words that no key phrase contains."""
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_SPACE = re.compile(r"[^\S\n]+")
Span = tuple[int, int]


def key_phrases(text: str) -> list[list[Span]]:
    """Return where each key phrase of a text stands, the most important phrase first.

    A key phrase is a run of words that no stop word, punctuation mark or line break interrupts. Its score is the sum
    over its words of degree over frequency, where the degree of a word counts the words of all phrases that have it.
    Of phrases with the same score, the one that occurs first comes first.

    Args:
        text: Text in any language; without English stop words, phrases are whatever stands between punctuation.

    Returns:
        Beginning and end of each occurrence, by phrase.
    """
    runs: list[list[re.Match[str]]] = [[]]
    end = 0
    for word in _WORD.finditer(text):
        if not _SPACE.fullmatch(text, end, word.start()):
            runs.append([])
        if word[0].lower() in STOP_WORDS:
            runs.append([])
        else:
            runs[-1].append(word)
        end = word.end()
    places: dict[tuple[str, ...], list[Span]] = defaultdict(list)
    frequency, degree = Counter[str](), Counter[str]()
    for run in filter(None, runs):
        words = tuple(word[0].lower() for word in run)
        places[words].append((run[0].start(), run[-1].end()))
        frequency.update(words)
        degree.update({word: count * len(words) for word, count in Counter(words).items()})
    ranked = sorted(places, key=lambda words: -sum(degree[word] / frequency[word] for word in words))
    return [places[words] for words in ranked]


def without_phrases(text: str, share: float) -> str:
    """Return a text without a share of its key phrases, the most important ones, and without the space before them.

    Args:
        text: Text to shorten.
        share: Share of the phrases, rounded up to a whole number of phrases.

    Returns:
        The shorter text. A text of which no word would be left loses one phrase less.
    """
    phrases = key_phrases(text)
    for count in range(math.ceil(share * len(phrases)), 0, -1):
        shorter = _without(text, [span for places in phrases[:count] for span in places])
        if _WORD.search(shorter):
            return shorter
    return text


def _without(text: str, spans: list[Span]) -> str:
    """Return a text without some spans and the space before each; after the first words, the space behind them."""
    kept, end = "", 0
    for start, stop in [*sorted(spans), (len(text), len(text))]:
        part = text[end:start]
        if end > 0 and not kept.strip():
            part = part.lstrip(" \t")
        kept += part
        # The space that the text begins with stays, as it is part of how a completion follows its prompt.
        if start < len(text) and kept.strip():
            kept = kept.rstrip(" \t")
        end = stop
    return kept
