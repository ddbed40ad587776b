"""Judge by a reward function: the completion with the higher reward is better."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from spo.data import Reward
from spo.data.rows import Text
from spo.errors import JudgeError
from spo.evaluation.judges.base import JudgedPair, as_read
from spo.evaluation.winrate import verdict_of_rewards


class RewardJudge:
    """Judge that compares completions by a reward function.

    Args:
        reward: Function ``reward(prompts, completions)`` that returns the key ``reward`` and any components, with one
            number per completion.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    @property
    def identity(self) -> dict[str, Any]:
        """Return the name of the function and its bound arguments."""
        return {"judge": "reward", "reward": _name(self.reward)}

    def scores(self, prompts: Sequence[Text], completions: Sequence[str]) -> dict[str, list[float]]:
        """Return the rewards and their components. The function is given each prompt as a person reads it.

        Raises:
            JudgeError: The function does not return one finite number per completion.
        """
        scores = self.reward([self._shown(prompt) for prompt in prompts], completions)
        name = _name(self.reward)
        if not isinstance(scores, dict) or "reward" not in scores:
            raise JudgeError(f'{name}: a reward function returns {{"reward": [...]}}, this returned {scores!r:.80}')
        found = {str(key): [float(value) for value in values] for key, values in scores.items()}
        for key, values in found.items():
            if len(values) != len(completions):
                raise JudgeError(f"{name}: {len(values)} values of {key} for {len(completions)} completions")
            if not all(map(math.isfinite, values)):
                raise JudgeError(f"{name}: {key} is not a finite number for every completion")
        return found

    def verdicts(self, comparisons: Sequence[JudgedPair]) -> list[float | None]:
        """Return verdicts from the rewards; equal rewards are a tie."""
        prompts = [comparison.prompt for comparison in comparisons]
        first = self.scores(prompts, [comparison.first for comparison in comparisons])["reward"]
        second = self.scores(prompts, [comparison.second for comparison in comparisons])["reward"]
        return [verdict_of_rewards(a, b) for a, b in zip(first, second, strict=True)]

    def _shown(self, prompt: Text) -> Any:
        """Return a prompt as the function is given it."""
        return as_read(prompt)

    def usage(self) -> dict[str, float]:
        """Return nothing, because a reward function does not count."""
        return {}


def reward_judge(reward: Reward | None) -> RewardJudge | None:
    """Return the judge of a reward function, or ``None`` for data without a reward.

    Args:
        reward: Function or callable object; a class is instantiated first.
    """
    if isinstance(reward, partial) and inspect.isclass(reward.func):  # a class in _target_ with _partial_
        reward = reward()
    return None if reward is None else RewardJudge(reward)


def _name(reward: Any) -> str:
    if isinstance(reward, partial):
        given = ", ".join(f"{key}={value!r}" for key, value in reward.keywords.items())
        return f"{_name(reward.func)}({given})" if given else _name(reward.func)
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}.{named.__qualname__}"
