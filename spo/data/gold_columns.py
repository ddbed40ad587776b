"""Columns of a pair that follow from the gold rewards of its completions, for losses that read such numbers."""

from __future__ import annotations

import math
from collections.abc import Collection

FLIP_PROBABILITY = "flip_probability"
GOLD_COLUMNS = ("chosen_reward", "rejected_reward", "chosen_win_rate", "rejected_win_rate", FLIP_PROBABILITY)
"""Columns that data with a gold reward provides."""


def gold_columns(chosen: float, rejected: float, label_noise: float, names: Collection[str]) -> dict[str, float]:
    """Return columns of a pair by name.

    ``chosen_reward`` and ``rejected_reward`` are the gold rewards. ``chosen_win_rate`` and ``rejected_win_rate`` are
    the mean probabilities of winning against the two completions of the pair, with 1/2 against itself.
    ``flip_probability`` is the probability that a further label, drawn as the Bradley-Terry model and the noise state,
    prefers the rejected completion.

    Args:
        chosen: Gold reward of the better completion.
        rejected: Gold reward of the worse completion.
        label_noise: Probability that a label is flipped.
        names: Names of the columns to return; others are ignored.
    """
    wins, losses = sigmoid(chosen - rejected), sigmoid(rejected - chosen)
    values = {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "chosen_win_rate": (0.5 + wins) / 2,
        "rejected_win_rate": (0.5 + losses) / 2,
        FLIP_PROBABILITY: losses + label_noise * (1 - 2 * losses),
    }
    return {name: value for name, value in values.items() if name in names}


def sigmoid(x: float) -> float:
    """Return the logistic function of any finite number, without overflow."""
    return 0.5 * (1 + math.tanh(x / 2))
