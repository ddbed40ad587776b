"""Notes of a run: facts that a person should know, each as one line on the terminal and a count in metrics.json.

A note is not an error. It states that something was done in another way than a reader might expect, such as rows that
were cleaned or a model that runs without packing. Any part of the package may write one with :func:`note`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger(__name__)

PREFIX = "notes/"
"""Beginning of the keys of notes in ``metrics.json``."""


class _Notes(dict[str, float]):
    """Counts by key, and the sentences of the notes that were written in this process."""

    def __init__(self) -> None:
        self.sentences: dict[str, str] = {}


_collected: ContextVar[_Notes | None] = ContextVar("collected", default=None)


def note(key: str, sentence: str, count: float = 1) -> None:
    """Log a note once, and count it for ``metrics.json`` if a run collects notes.

    A second note with the same key in one run is not logged. It replaces the count, because a stage may be repeated.

    Args:
        key: Name of the note in snake case, such as ``repeated_prompts``.
        sentence: One line for a person, with the count where it tells something.
        count: Number of rows, tensors or other things that the note is about.
    """
    collected = _collected.get()
    if collected is None or PREFIX + key not in collected:
        log.warning(sentence)
    if collected is not None:
        collected[PREFIX + key] = float(count)
        collected.sentences.setdefault(key, sentence)


def collected_notes() -> dict[str, float]:
    """Return the counts of the notes so far by key, with :data:`PREFIX`; empty outside of a run."""
    return dict(_collected.get() or {})


def written_notes() -> dict[str, tuple[str, float]]:
    """Return sentence and count of each note that was written in this process, by key; empty outside of a run."""
    collected = _collected.get()
    if collected is None:
        return {}
    return {key: (sentence, collected[PREFIX + key]) for key, sentence in collected.sentences.items()}


def add_notes(others: Mapping[str, tuple[str, float]]) -> None:
    """Write the notes of another process of the run that this process does not have.

    Args:
        others: What :func:`written_notes` returned there.
    """
    for key, (sentence, count) in others.items():
        if PREFIX + key not in collected_notes():
            note(key, sentence, count)


def restore_notes(earlier: Mapping[str, float]) -> None:
    """Add the notes of an interrupted run to those of the run that resumes it, whose own counts are newer.

    Args:
        earlier: What :func:`collected_notes` returned.
    """
    collected = _collected.get()
    if collected is not None:
        collected.update({key: count for key, count in earlier.items() if key not in collected})


@contextmanager
def collect_notes() -> Iterator[dict[str, float]]:
    """Collect the notes of a block of code.

    Yields:
        Counts by key, with :data:`PREFIX`. The mapping grows while the block runs.
    """
    collected = _Notes()
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)
