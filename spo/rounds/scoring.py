"""Scores and win rates of the completions of each prompt, from any judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from spo.data.gold_columns import sigmoid
from spo.data.rows import Text
from spo.errors import UserError
from spo.evaluation.judges.base import Judge, JudgedPair, as_read, compare_all
from spo.notes import note


@dataclass
class Scores:
    """Scores of the completions of one prompt.

    Attributes:
        scores: ``(K,)`` score of each completion, a higher one is better: rewards, or win rates.
        win_rates: ``(K,)`` mean probability that the completion beats the ``K``, itself included with 1/2.
        are_rewards: True for rewards; false for win rates of a judge that only compares.
    """

    scores: list[float]
    win_rates: list[float]
    are_rewards: bool = True

    def of(self, places: Sequence[int]) -> Scores:
        """Return the scores of some of the completions, in the order of their places."""
        scores, win_rates = ([values[place] for place in places] for values in (self.scores, self.win_rates))
        return Scores(scores, win_rates, self.are_rewards)


def score_completions(
    judge: Judge, prompts: Sequence[Text], groups: Sequence[Sequence[str]], reward: str = "reward", scale: float = 1.0
) -> list[Scores]:
    """Score the completions of each prompt.

    A judge with rewards gives them as scores, and the win rate of completion i is the mean of sigmoid(r_i - r_j) over
    all j, as in SPPO (arXiv:2405.00675). A judge that only compares is asked about every two different completions of
    a prompt, and the mean of its verdicts is both the win rate and the score. An equal completion, the completion
    itself, and a comparison without an answer count as 1/2.

    Args:
        judge: Judge of the completions.
        prompts: Prompts: text, or the messages of a conversation.
        groups: Completions of each prompt, without the tokens that end them.
        reward: Name of the reward or of the component that scores.
        scale: Factor of the reward.

    Returns:
        Scores of each prompt.

    Raises:
        UserError: The judge does not have a reward of this name.
        JudgeError: The judge cannot do its work.
    """
    asked = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    found = judge.scores(asked, [completion for group in groups for completion in group]) if asked else {}
    if found is None:
        if reward != "reward":
            raise UserError(
                f"iteration.source.reward={reward}: the judge only compares completions and does not give rewards; "
                "choose iteration.source.reward=reward, or a judge that gives rewards"
            )
        return _compared(judge, prompts, groups)
    if asked and reward not in found:
        raise UserError(
            f"iteration.source.reward={reward}: the judge does not give a reward of this name; choose one of "
            f"{', '.join(found)}"
        )
    values = iter(found.get(reward, ()))
    rewards = [[scale * next(values) for _ in group] for group in groups]
    return [Scores(some, win_rates_of_rewards(some)) for some in rewards]


def win_rates_of_rewards(rewards: Sequence[float]) -> list[float]:
    """Return the ``(K,)`` mean of sigmoid(r_i - r_j) over all j, i itself included with 1/2.

    Args:
        rewards: ``(K,)`` rewards of the completions of one prompt.
    """
    # fmean does not depend on the order, so that completions with equal terms have equal win rates.
    return [fmean(sigmoid(own - other) for other in rewards) for own in rewards]


def _compared(judge: Judge, prompts: Sequence[Text], groups: Sequence[Sequence[str]]) -> list[Scores]:
    """Return the win rates of the completions of each prompt as their scores."""
    verdicts = compare_all(judge, prompts, groups)
    count = len(verdicts) // 2  # Each comparison is there in both orders.
    if missing := sum(verdict is None for verdict in verdicts.values()) // 2:
        note(
            "unanswered_comparisons",
            f"the judge did not answer {missing} of {count} comparisons of completions; each counts as a tie",
            missing,
        )

    def verdict(prompt: str, own: str, other: str) -> float:
        found = verdicts.get(JudgedPair(prompt, own, other))
        return 0.5 if found is None else found

    scored = []
    for prompt, group in zip(map(as_read, prompts), groups, strict=True):
        rates = [fmean(verdict(prompt, own, other) for other in group) for own in group]
        scored.append(Scores(rates, list(rates), are_rewards=False))
    return scored
