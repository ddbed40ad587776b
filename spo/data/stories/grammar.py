"""A small world of short stories: a seeded grammar that writes openings and their continuations.

A story is an *opening* (who, where, and what they wish for) and a *continuation* (a problem, an attempt, a
resolution, an ending). Sentences are templates with three kinds of marks:

* ``{Name} {She} {she} {her} {own} {thing} {wish} ...`` come from the story's hero and wish.
* ``[tall|old]`` offers adjectives, which vivid stories use more often than plain ones.
* ``a`` becomes ``an`` before a vowel.

Some stories are bad on purpose, see :data:`FLAWS`, so that a model of the corpus can improve with preferences.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import prod
from random import Random

from spo.data.rows import SPLITS, Split

NAMES = {
    "Mia": "she", "Lily": "she", "Rosa": "she", "Anna": "she", "Zoe": "she", "Nora": "she",
    "Tom": "he", "Ben": "he", "Max": "he", "Leo": "he", "Finn": "he", "Oscar": "he",
}  # fmt: skip
"""Names of heroes and their pronouns."""

SPECIES = ("fox", "rabbit", "bear", "mouse", "cat", "duck", "frog", "goat", "hedgehog", "badger")
PLACES = (
    "by the river", "near the forest", "on a hill", "by the sea", "in a village",
    "under an oak", "by the lake", "in a garden", "near the mill", "on a farm",
)  # fmt: skip
QUALITIES = ("red", "blue", "green", "yellow", "golden", "silver", "tiny", "shiny")
THINGS = ("kite", "ball", "drum", "hat", "lamp", "boat", "bell", "book", "cup", "ring", "flute", "scarf")

OPENINGS = (
    "{Name} the {species} lived {place}. {She} wanted a {wish}.",
    "{Name} was a {species} who lived {place}. {She} dreamed of a {wish}.",
    "There was a {species} named {Name} {place}. {She} wished for a {wish}.",
)


@dataclass(frozen=True)
class Thread:
    """One kind of plot: sentences that belong together.

    Attributes:
        problem: Templates of the obstacle between the hero and the wish.
        attempt: Templates of the hero's reaction.
        resolution: Templates of its success.
    """

    problem: tuple[str, ...]
    attempt: tuple[str, ...]
    resolution: tuple[str, ...]


THREADS = {
    "stuck": Thread(
        problem=(
            "But the {thing} was stuck in a [tall|thorny] tree.",
            "But the {thing} was stuck under a [heavy|mossy] rock.",
        ),
        attempt=(
            "{Name} pulled it with a [long|strong] rope.",
            "{She} pushed with a [long|crooked] stick.",
            "{Name} tugged with all {own} might.",
        ),
        resolution=(
            "At last the {thing} came loose.",
            "Suddenly the {wish} fell into {own} [little|open] arms.",
        ),
    ),
    "stolen": Thread(
        problem=(
            "But a [sly|greedy] crow had stolen the {thing}.",
            "But a [grumpy|sly] crow sat on the {thing}.",
        ),
        attempt=(
            "{Name} gave the crow a [sweet|warm] cake.",
            "{She} sang the crow a [gentle|merry] song.",
            "{Name} told the crow a [funny|gentle] tale.",
        ),
        resolution=(
            "The crow laughed and gave {her} the {thing}.",
            "The [happy|sleepy] crow let the {wish} go.",
        ),
    ),
    "costly": Thread(
        problem=(
            "But the {thing} cost ten [bright|heavy] coins.",
            "But {she} had no coins for a {thing}.",
        ),
        attempt=(
            "{Name} baked [warm|sweet] bread and sold it.",
            "{She} swept the [dusty|busy] shop all day.",
            "{Name} sold [juicy|sweet] berries at the [busy|merry] market.",
        ),
        resolution=(
            "Soon {she} had ten coins and bought the {wish}.",
            "With a [heavy|little] bag of coins {she} bought the {thing}.",
        ),
    ),
    "lost": Thread(
        problem=(
            "But the {thing} was lost in the [dark|misty] woods.",
            "But nobody knew where to find a {thing}.",
        ),
        attempt=(
            "{Name} asked a [wise|old] owl for help.",
            "{She} followed a [narrow|winding] path.",
            "{Name} looked behind every [mossy|dark] stone.",
        ),
        resolution=(
            "There, in the [soft|tall] grass, {she} found the {thing}.",
            "Under a [crooked|mossy] log {she} found the {wish}.",
        ),
    ),
}
"""Kinds of plots by name. Words such as *stuck* or *coins* identify a sentence's part in the plot."""

ENDINGS = (
    "{Name} smiled and danced home.",
    "{She} hugged the {thing} and laughed.",
    "{Name} shared the {wish} with [dear|happy] friends.",
    "{She} was happy and slept with a [warm|little] smile.",
    "{Name} was happy for the rest of the [bright|golden] summer.",
)
SCENES = (
    "One [sunny|misty] morning {Name} set out.",
    "Every [quiet|starry] night {she} thought of it.",
)
RAMBLES = (
    "The wind blew over the hills.",
    "It was a day like any other.",
    "Some clouds went by.",
    "A cart rolled down the road.",
    "Then it rained for a while.",
)
GIVING_UP = (
    "Then {she} went to bed.",
    "Then it was dark.",
    "{Name} did not know what to do.",
)

FLAWS = {
    "stranger": 0.15,  # another name, with its own pronoun, takes the hero's place from some sentence on
    "swap": 0.15,  # another thing takes the place of the wish from some sentence on
    "repeat": 0.15,  # one sentence is told twice
    "unresolved": 0.20,  # the attempt leads nowhere: no resolution, and the story just stops
    "mixed": 0.15,  # attempt and resolution belong to different kinds of plot
    "ramble": 0.20,  # one or two sentences have nothing to do with the story
}
"""Share of corpus stories with each flaw. Flaws are drawn independently of each other."""

STYLES = (0.05, 0.4, 0.8)
"""Probabilities that an adjective slot is filled in plain, middling and vivid stories."""

SCENE_SHARE = 0.3
"""Share of stories with a scene before the problem."""

_FORMS = {
    "she": {"She": "She", "she": "she", "her": "her", "own": "her"},
    "he": {"She": "He", "she": "he", "her": "him", "own": "his"},
}
_SLOT = re.compile(r"\[([^\]]+)\] ")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


@dataclass(frozen=True)
class Hero:
    """The hero of a story and the wish, which fill the marks of templates.

    Attributes:
        name: Name of the hero, which decides the pronoun.
        thing: Thing that the hero wishes for.
        quality: Adjective of the thing.
    """

    name: str
    thing: str
    quality: str

    @property
    def fields(self) -> dict[str, str]:
        """Return the values of the marks in a template."""
        wish = f"{self.quality} {self.thing}"
        return {"Name": self.name, "thing": self.thing, "wish": wish, **_FORMS[NAMES[self.name]]}


def slots(template: str) -> list[tuple[str, ...]]:
    """Return the adjectives that each ``[tall|old]`` mark of a template offers."""
    return [tuple(slot.split("|")) for slot in _SLOT.findall(template)]


def plain(template: str) -> str:
    """Return a template without its adjectives."""
    return _SLOT.sub("", template)


def templates() -> Iterator[tuple[str, str | None, str]]:
    """Yield every sentence template of a continuation as ``(part, name of its thread or None, template)``."""
    for name, thread in THREADS.items():
        for part in ("problem", "attempt", "resolution"):
            yield from ((part, name, template) for template in getattr(thread, part))
    loose = {"ending": ENDINGS, "scene": SCENES, "ramble": RAMBLES, "giving_up": GIVING_UP}
    yield from ((part, None, template) for part, options in loose.items() for template in options)


def fill(template: str, hero: Hero, adjectives: list[str | None], **more: str) -> str:
    """Write one sentence.

    Args:
        template: Text with marks.
        hero: Hero and wish of the story.
        adjectives: Word for each slot of the template; ``None`` leaves the slot empty.
        more: Values of further marks (species, place).
    """
    words = iter(adjectives)
    text = _SLOT.sub(lambda _: f"{word} " if (word := next(words)) else "", template)
    return _ARTICLE.sub(r"\1n ", text.format(**hero.fields, **more))


def count_openings() -> int:
    """Return the number of distinct openings."""
    return prod(map(len, (OPENINGS, NAMES, SPECIES, PLACES, QUALITIES, THINGS)))


def most_openings(split: Split, heroes: Collection[str]) -> int:
    """Return the largest number of distinct openings of a split, about some heroes, that are drawn."""
    # Rejection sampling stays fast up to half of the openings.
    return count_openings() * {"train": 8}.get(split, 1) * len(heroes) // (20 * len(NAMES))


def split_of(opening: str) -> Split:
    """Return the split of an opening for every seed: a tenth each for selection and test, the rest for training."""
    digit = hashlib.blake2b(opening.encode(), digest_size=8).digest()[0] % 10
    return SPLITS[max(0, digit - 7)]


class StoryWorld:
    """A writer of stories, which are the same for the same seed in every process.

    Args:
        seed: Random seed of the world (``data.seed``).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def stories(self, n: int, stream: str) -> list[tuple[str, str]]:
        """Return corpus stories of mixed quality with openings of the train split.

        Args:
            n: Number of stories.
            stream: Name of an independent stream of randomness, in which a longer draw extends a shorter one.

        Returns:
            ``n`` pairs ``(opening, continuation)``; ``opening + " " + continuation`` is the story.
        """
        rng = Random(f"{self.seed}:stories:{stream}")
        stories: list[tuple[str, str]] = []
        while len(stories) < n:
            opening, hero = _opening(rng)
            continuation = _continuation(rng, hero)
            if split_of(opening) == "train":
                stories.append((opening, continuation))
        return stories

    def openings(
        self, n: int, split: Split, heroes: Collection[str] = tuple(NAMES), without: Collection[str] = ()
    ) -> list[str]:
        """Return distinct openings of one split, which no other split shares.

        Args:
            n: Number of openings.
            split: Name of the split: train, selection or test.
            heroes: Names of the heroes that the openings are about.
            without: Openings of the split to leave out. If there are some, the draw is another one.

        Raises:
            ValueError: If the split has too few openings.
        """
        limit = most_openings(split, heroes) - len(without)
        if n > limit:
            about = "" if len(heroes) == len(NAMES) else f" about {', '.join(heroes)}"
            raise ValueError(
                f"the story world has too few openings{about} for {n} {split} prompts: ask for at most {max(limit, 0)}"
            )
        rng = Random(f"{self.seed}:openings:{split}{':further' if without else ''}")
        found: dict[str, None] = {}
        while len(found) < n:
            opening, hero = _opening(rng)
            if split_of(opening) == split and hero.name in heroes and opening not in without:
                found[opening] = None
        return list(found)

    def continuations(self, opening: str, hero: Hero, wanted: Callable[[str], bool]) -> Iterator[str]:
        """Yield distinct continuations of an opening from the distribution of the corpus, without end.

        Args:
            opening: Opening, which has a stream of randomness of its own.
            hero: Hero and wish of the opening.
            wanted: Function that decides whether a continuation is one to yield.
        """
        rng = Random(f"{self.seed}:continuations:{opening}")
        found: set[str] = set()
        while True:
            continuation = _continuation(rng, hero)
            if continuation not in found and wanted(continuation):
                found.add(continuation)
                yield continuation


def _hero(rng: Random) -> Hero:
    return Hero(rng.choice(tuple(NAMES)), rng.choice(THINGS), rng.choice(QUALITIES))


def _opening(rng: Random) -> tuple[str, Hero]:
    hero = _hero(rng)
    template = rng.choice(OPENINGS)
    return fill(template, hero, [], species=rng.choice(SPECIES), place=rng.choice(PLACES)), hero


def _continuation(rng: Random, hero: Hero) -> str:
    flaws = {flaw for flaw, share in FLAWS.items() if rng.random() < share}
    style = rng.choice(STYLES)
    problem, attempt, resolution = _threads(rng, "mixed" in flaws)
    parts = [rng.choice(SCENES)] if rng.random() < SCENE_SHARE else []
    parts += [rng.choice(problem.problem), rng.choice(attempt.attempt)]
    if "unresolved" in flaws:
        parts.append(rng.choice(GIVING_UP))
    else:
        parts += [rng.choice(resolution.resolution), rng.choice(ENDINGS)]
    if "ramble" in flaws:
        for sentence in rng.sample(RAMBLES, rng.choice((1, 2))):
            parts.insert(rng.randrange(len(parts)), sentence)

    heroes = [hero] * len(parts)
    if "stranger" in flaws:
        name = rng.choice([name for name in NAMES if name != hero.name])
        heroes = _change_from_random_sentence(rng, heroes, lambda old: Hero(name, old.thing, old.quality))
    if "swap" in flaws:
        thing = rng.choice([thing for thing in THINGS if thing != hero.thing])
        heroes = _change_from_random_sentence(rng, heroes, lambda old: Hero(old.name, thing, old.quality))

    sentences = [
        fill(part, who, [rng.choice(slot) if rng.random() < style else None for slot in slots(part)])
        for part, who in zip(parts, heroes, strict=True)
    ]
    if "repeat" in flaws:
        again = rng.randrange(len(sentences))
        sentences.insert(again, sentences[again])
    return " ".join(sentences)


def _threads(rng: Random, mixed: bool) -> tuple[Thread, Thread, Thread]:
    """Draw the threads of problem, attempt and resolution; if ``mixed``, one of them differs."""
    thread, other = rng.sample(tuple(THREADS.values()), 2)
    if not mixed:
        return thread, thread, thread
    return (thread, other, other) if rng.random() < 0.5 else (thread, thread, other)


def _change_from_random_sentence(rng: Random, heroes: list[Hero], change: Callable[[Hero], Hero]) -> list[Hero]:
    """Change the heroes from a random sentence on, but never only that of the last sentence."""
    start = rng.randrange(len(heroes) - 1)
    return heroes[:start] + [change(hero) for hero in heroes[start:]]
