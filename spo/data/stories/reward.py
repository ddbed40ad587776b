"""The gold reward of the story world, which scores a continuation as a reader who knows the world would.

``reward = SCALE * fluency * (sum of weight * component over WEIGHTS) / (sum of weights)``, each component in [0, 1]:

* ``coherence``: three quarters for the share of sentences that stay with the opening, one quarter if the wish is named.
  Such a sentence mentions the hero or the thing, and does not mention another hero, pronoun, thing or color.
* ``plot``: problem, attempt, resolution and ending, a quarter each, counted only in this order. An attempt or a
  resolution that belongs to another problem counts half.
* ``freshness``: ``1 - REPETITION_COST * (share of repeated word trigrams)``, at least 0.
* ``vividness``: twice the number of distinct adjectives per sentence, at most 1.
* ``brevity``: 1 up to ``SHORT_WORDS`` words, falling to 0 at ``LONG_WORDS`` words.
* ``fluency`` multiplies all of them. It is the share of word trigrams, sentence ends included, that occur in the world,
  so that gibberish and word salad earn almost nothing.

Plot and vividness reward more words, brevity and freshness fewer, so the reward does not simply grow with length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from operator import itemgetter

from spo.data.stories.grammar import NAMES, QUALITIES, THINGS, Hero, fill, plain, slots, templates

# The weights and costs are part of the benchmark: a change makes old rewards incomparable.
WEIGHTS = {"coherence": 4.0, "plot": 4.0, "freshness": 2.0, "vividness": 2.0, "brevity": 2.0}
SCALE = 10.0
REPETITION_COST = 4.0
SHORT_WORDS, LONG_WORDS = 28, 52

_WORD = re.compile(r"[^\W\d_]+|[.!?]")
_PRONOUNS = {"she": "she", "her": "she", "he": "he", "him": "he", "his": "he"}
# Words that templates fill in become their kind, so that trigrams and templates match for every hero and wish.
_ROLES = {
    **{name.lower(): "name" for name in NAMES},
    **{thing: "thing" for thing in THINGS},
    **{quality: "quality" for quality in QUALITIES},
    **{"she": "she", "he": "she", "her": "her", "him": "her", "his": "her", "an": "a"},
}
ADJECTIVES = frozenset(word for _, _, template in templates() for slot in slots(template) for word in slot)
_STEPS = {"problem": 1, "attempt": 2, "resolution": 3, "ending": 4}
_MIN_SIMILARITY = 0.6  # Dice coefficient of a sentence and a template
_END = "."


class GoldReward:
    """A reward for continuations of story openings, of the type :data:`spo.data.rows.Reward`.

    It accepts any text, and text from outside the story world scores low.
    """

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
        """Score each completion.

        Args:
            prompts: Story openings.
            completions: One continuation for each opening.

        Returns:
            Lists of one number per completion: the key ``reward``, and one key for each component.

        Raises:
            ValueError: If the two lists differ in length.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions: one completion per prompt")
        scores = [score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return {key: [row[key] for row in scores] for key in ("reward", *WEIGHTS, "fluency")}


def score(prompt: str, completion: str) -> dict[str, float]:
    """Return the reward and the components of one completion."""
    sentences = _sentences(completion)
    words = [word for sentence in sentences for word in sentence]
    parts = {
        "coherence": _coherence(_subject(prompt), sentences),
        "plot": _plot(sentences),
        "freshness": _freshness(words),
        "vividness": min(1.0, 2 * len(ADJECTIVES & set(words)) / max(1, len(sentences))),
        "brevity": min(1.0, max(0.0, (LONG_WORDS - len(words)) / (LONG_WORDS - SHORT_WORDS))),
    }
    fluency = _fluency(sentences)
    total = sum(WEIGHTS[key] * value for key, value in parts.items()) / sum(WEIGHTS.values())
    return {"reward": SCALE * fluency * total, **parts, "fluency": fluency}


def problem_of(completion: str) -> str | None:
    """Return the kind of the first problem in a completion, a key of ``THREADS``; ``None`` if there is no problem."""
    parts = map(_part, _sentences(completion))
    return next((thread for part, thread in parts if part == "problem"), None)


def subject(prompt: str) -> Hero:
    """Return the hero and the wish of an opening.

    Raises:
        ValueError: If the prompt is not an opening of this world.
    """
    hero = _subject(prompt)
    if hero is None:
        raise ValueError(f"not an opening of the story world: {prompt!r}")
    return hero


def _sentences(text: str) -> list[tuple[str, ...]]:
    """Return the words of each sentence in lower case."""
    sentences: list[tuple[str, ...]] = []
    current: list[str] = []
    for word in [*_WORD.findall(text.lower()), _END]:
        if word not in ".!?":
            current.append(word)
        elif current:
            sentences.append(tuple(current))
            current = []
    return sentences


@lru_cache(maxsize=1 << 16)
def _subject(prompt: str) -> Hero | None:
    """Return the hero of an opening, or ``None`` if the prompt is not from this world."""
    words = [word for sentence in _sentences(prompt) for word in sentence]
    name = next((name for name in NAMES if name.lower() in words), None)
    thing = next((word for word in words if word in THINGS), None)
    quality = next((word for word in words if word in QUALITIES), None)
    return Hero(name, thing, quality) if name and thing and quality else None


def _coherence(hero: Hero | None, sentences: list[tuple[str, ...]]) -> float:
    if hero is None or not sentences:
        return 0.0
    kept = sum(_is_on_topic(hero, sentence) for sentence in sentences) / len(sentences)
    named = any(hero.thing in sentence for sentence in sentences)
    return 0.75 * kept + 0.25 * named


@lru_cache(maxsize=1 << 16)
def _is_on_topic(hero: Hero, sentence: tuple[str, ...]) -> bool:
    """Return whether a sentence is about the hero or the wish and does not contradict the opening."""
    mentioned = {
        "name": {word for word in sentence if _ROLES.get(word) == "name"},
        "pronoun": {_PRONOUNS[word] for word in sentence if word in _PRONOUNS},
        "thing": {word for word in sentence if word in THINGS},
        "quality": {word for word in sentence if word in QUALITIES},
    }
    own = {"name": hero.name.lower(), "pronoun": NAMES[hero.name], "thing": hero.thing, "quality": hero.quality}
    is_about_hero = any(own[key] in mentioned[key] for key in ("name", "pronoun", "thing"))
    return is_about_hero and all(words <= {own[key]} for key, words in mentioned.items())


def _plot(sentences: list[tuple[str, ...]]) -> float:
    """Return the value of the best chain of steps in order, a quarter for each step."""
    # Value of the best chain so far, by its last step and the thread of its problem.
    best: dict[tuple[int, str | None], float] = {(0, None): 0.0}
    for sentence in sentences:
        part, thread = _part(sentence)
        step = _STEPS.get(part, 0)
        for (reached, problem), value in list(best.items()):
            if step > reached:
                gain = 0.5 if part in ("attempt", "resolution") and thread != problem else 1.0
                state = (step, thread if part == "problem" else problem)
                best[state] = max(best.get(state, 0.0), value + gain)
    return max(best.values()) / len(_STEPS)


# Samples repeat sentences and prompts, so parts of the score are cached.
@lru_cache(maxsize=1 << 16)
def _part(sentence: tuple[str, ...]) -> tuple[str, str | None]:
    """Return part and thread of the most similar template, or an empty part if none is similar enough."""
    core = _core(sentence)
    similarity, part, thread = max(
        ((2 * len(core & other) / (len(core) + len(other)), part, thread) for other, part, thread in _cores()),
        key=itemgetter(0),
    )
    return (part, thread) if similarity > _MIN_SIMILARITY else ("", None)


def _core(sentence: Sequence[str]) -> frozenset[str]:
    """Return the words of a sentence without adjectives, with names and things replaced by their kinds."""
    return frozenset(_ROLES.get(word, word) for word in sentence if word not in ADJECTIVES) - {"quality"}


@lru_cache(maxsize=1)
def _cores() -> list[tuple[frozenset[str], str, str | None]]:
    """Return the core, part and thread of each template."""
    hero = Hero("Mia", THINGS[0], QUALITIES[0])
    return [
        (_core(_sentences(fill(plain(template), hero, []))[0]), part, thread) for part, thread, template in templates()
    ]


def _freshness(words: list[str]) -> float:
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    repeated = 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
    return max(0.0, 1 - REPETITION_COST * repeated)


def _fluency(sentences: list[tuple[str, ...]]) -> float:
    trigrams = [trigram for sentence in sentences for trigram in _trigrams(sentence)]
    return sum(trigram in _known_trigrams() for trigram in trigrams) / len(trigrams) if trigrams else 0.0


def _trigrams(sentence: Sequence[str]) -> list[tuple[str, ...]]:
    padded = (_END, *(_ROLES.get(word, word) for word in sentence), _END)
    return list(zip(padded, padded[1:], padded[2:], strict=False))


@lru_cache(maxsize=1)
def _known_trigrams() -> frozenset[tuple[str, ...]]:
    """Return all trigrams that templates can write, with names, things, qualities and pronouns as kinds of words."""
    hero = Hero("Mia", THINGS[0], QUALITIES[0])
    known: set[tuple[str, ...]] = set()
    for _, _, template in templates():
        for choice in product(*[(None, *slot) for slot in slots(template)]):
            known.update(_trigrams(_sentences(fill(template, hero, list(choice)))[0]))
    return frozenset(known)
