"""Best of several completions of one prompt, by any judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from spo.data.rows import Text
from spo.errors import JudgeError
from spo.evaluation.judges.base import Judge, JudgedPair, as_read, compare_all


@dataclass(frozen=True)
class Standing:
    """Values by which the completions of one prompt are ordered.

    Attributes:
        measure: ``reward`` of a judge that scores, or ``win_rate`` against the other completions.
        values: Value of each completion, the higher the better; ``None`` without an answer of the judge.
    """

    measure: Literal["reward", "win_rate"]
    values: list[float | None]

    @property
    def best(self) -> int:
        """Return the index of the best completion, the first of equals."""
        known = [(value, -place) for place, value in enumerate(self.values) if value is not None]
        return -max(known)[1]


def standing_of(judge: Judge, prompt: Text, completions: Sequence[str]) -> Standing:
    """Ask a judge about several completions of one prompt.

    A judge that scores is asked for its rewards. Any other judge compares each completion with each other one, so that
    ``N`` completions take ``N (N - 1) / 2`` comparisons. A tie counts as half a win, an equal completion as a tie, and
    a single completion as 0.5. A comparison without an answer is left out.

    Args:
        judge: Judge of completions.
        prompt: Prompt: text, or the messages of a conversation.
        completions: Completions without the tokens that end them, at least one.

    Raises:
        ValueError: There is no completion.
        JudgeError: The judge did not answer a single question.
    """
    if not completions:
        raise ValueError("there is no completion to choose from")
    scores = judge.scores([prompt] * len(completions), completions)
    if scores is not None:
        return Standing("reward", [*scores["reward"]])
    if len(completions) == 1:
        return Standing("win_rate", [0.5])
    verdicts, shown = compare_all(judge, [prompt], [completions]), as_read(prompt)
    win_rates: list[float | None] = []
    for i, own in enumerate(completions):
        others = [*completions[:i], *completions[i + 1 :]]
        found = [verdicts.get(JudgedPair(shown, own, other), 0.5) for other in others]
        answered = [verdict for verdict in found if verdict is not None]
        win_rates.append(fmean(answered) if answered else None)
    if all(rate is None for rate in win_rates):
        raise JudgeError("the judge did not answer a single question about these completions: ask again")
    return Standing("win_rate", win_rates)


def best_of(judge: Judge, prompt: Text, completions: Sequence[str]) -> int:
    """Return the index of the best completion of a prompt, the first of equals.

    Best-of-n sampling draws ``n`` completions and keeps this one.

    Args:
        judge: Judge of completions; one that only compares decides by the win rate against the other completions.
        prompt: Prompt: text, or the messages of a conversation.
        completions: Completions without the tokens that end them, at least one.

    Raises:
        ValueError: There is no completion.
        JudgeError: The judge did not answer a single question.
    """
    return standing_of(judge, prompt, completions).best
