"""The budget that a run has trained so far: optimizer steps, pairs, and tokens sampled for the objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from spo.wording import finite, number

PREFIX = "trained/"
"""Beginning of the keys of the budget in ``metrics.json``."""
BUDGET_WORDS = {"steps": "steps", "pairs": "pairs", "sampled_tokens": "tokens sampled"}
"""Counts of the budget, each with its words for people."""
SAMPLED = f"{PREFIX}sampled_tokens"
"""Key of the completion tokens that were sampled for the objective."""
COSTS = {"time/train_s": ("training", "s"), SAMPLED: ("sampled", "tokens")}
"""Keys of the costs of a run in ``metrics.json``, each with its name and its unit."""


@dataclass
class Trained:
    """Counts over all processes, from the first step on, also after a resume.

    Attributes:
        steps: Optimizer steps that changed the weights; a step that was skipped does not count.
        pairs: Pairs of these steps, of which a labelled completion is half. ``None`` if a checkpoint of an older
            version did not record them.
        sampled_tokens: Completion tokens that were sampled for the objective, or ``None`` as for ``pairs``. Samples
            that only measure the policy do not count.
        earlier_seconds: Seconds that earlier processes trained until the checkpoint from which this one resumes;
            ``None`` if a checkpoint of an older version did not record them.
    """

    steps: int = 0
    pairs: float | None = 0
    sampled_tokens: int | None = 0
    earlier_seconds: float | None = field(default=0.0, compare=False)
    _started: float = field(default_factory=perf_counter, repr=False, compare=False)
    _recent: dict[int, float] = field(default_factory=dict, repr=False, compare=False)

    def add_step(self, number: int, pairs: float) -> None:
        """Count an optimizer step.

        Args:
            number: Steps before this one.
            pairs: Pairs of the step, over all processes.
        """
        # Whether a step was skipped may be known only when the next one begins.
        self._recent = {key: count for key, count in self._recent.items() if key == number - 1} | {number: pairs}
        self._count(1, pairs)

    def skip_step(self, number: int) -> None:
        """Take back one of the last two steps, because it did not change the weights.

        Args:
            number: Number that the step was counted with.
        """
        self._count(-1, -self._recent.pop(number))

    def _count(self, steps: int, pairs: float) -> None:
        self.steps += steps
        if self.pairs is not None:
            self.pairs += pairs

    def add_samples(self, tokens: int) -> None:
        """Count samples of the policy.

        Args:
            tokens: Completion tokens of the samples, over all processes.
        """
        if self.sampled_tokens is not None:
            self.sampled_tokens += tokens

    def metrics(self) -> dict[str, float]:
        """Return the known counts under their keys in ``metrics.json``."""
        return {PREFIX + name: float(count) for name, count in self._counts().items() if count is not None}

    def _counts(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in BUDGET_WORDS}

    def state_dict(self) -> dict[str, float | None]:
        """Return the counts, and the seconds until now."""
        earlier = self.earlier_seconds
        return {**self._counts(), "seconds": None if earlier is None else earlier + perf_counter() - self._started}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Restore the counts that :meth:`state_dict` returned."""
        for name in BUDGET_WORDS:
            setattr(self, name, state[name])
        self.earlier_seconds = state.get("seconds")


def written(count: float) -> str:
    """Write a count such as ``1,234``, or ``2.5`` for a half pair."""
    return f"{count:,.1f}".removesuffix(".0")


def cost_text(key: str, value: float | None) -> str:
    """Write a cost; an unknown one is a dash and not zero.

    Args:
        key: One of ``COSTS``.
        value: Value of the cost, ``None`` where it is unknown.
    """
    return f"{value:,.0f}" if value is not None and key == SAMPLED else number(value)


def describe_budget(metrics: Mapping[str, Any]) -> str:
    """Write the budget of a run, such as ``18 steps, 144 pairs, 2,304 tokens sampled``; empty where it is unknown.

    Args:
        metrics: Content of ``metrics.json``.
    """
    known = {words: finite(metrics.get(PREFIX + name)) for name, words in BUDGET_WORDS.items()}
    return ", ".join(f"{written(count)} {words}" for words, count in known.items() if count is not None)
