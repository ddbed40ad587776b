"""Differences of log-probabilities of a pair, which most losses are functions of."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from spo.types import PairLogps

NLLMean = Literal["sum", "completion", "batch"]
"""Denominator of a negative log-likelihood: none, the tokens of the completion, or the tokens of the whole step."""


def is_higher(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return 1 where the reward of chosen is higher, 0.5 where both are equal, as before training, and else 0."""
    return ((chosen > rejected).float() + (chosen >= rejected).float()) / 2


def log_ratios(pair: PairLogps) -> tuple[Tensor, Tensor | None]:
    """Return the ``(B,)`` log pi - log pi_ref of chosen and rejected; without a reference, log pi alone."""
    chosen, rejected = pair.policy_chosen, pair.policy_rejected
    if pair.reference_chosen is not None:
        chosen = chosen - pair.reference_chosen
    if rejected is not None and pair.reference_rejected is not None:
        rejected = rejected - pair.reference_rejected
    return chosen, rejected


def policy_margin(pair: PairLogps) -> Tensor:
    """Return the ``(B,)`` log pi(y_w|x) - log pi(y_l|x).

    Raises:
        ValueError: There is no rejected completion.
    """
    if pair.policy_rejected is None:
        raise ValueError("this loss compares two completions, but policy_rejected is None")
    return pair.policy_chosen - pair.policy_rejected


def reference_margin(pair: PairLogps) -> Tensor:
    """Return the ``(B,)`` log pi_ref(y_w|x) - log pi_ref(y_l|x).

    Raises:
        ValueError: A reference log-probability is missing.
    """
    if pair.reference_chosen is None or pair.reference_rejected is None:
        raise ValueError("this loss needs reference_chosen and reference_rejected")
    return pair.reference_chosen - pair.reference_rejected


def log_ratio_margin(pair: PairLogps) -> Tensor:
    """Return the ``(B,)`` margin h of DPO: the log-ratio of policy and reference at y_w, minus that at y_l.

    Raises:
        ValueError: A log-probability is missing.
    """
    return policy_margin(pair) - reference_margin(pair)


def both_log_ratios(pair: PairLogps) -> tuple[Tensor, Tensor]:
    """Return the ``(B,)`` log pi - log pi_ref of chosen and of rejected.

    Raises:
        ValueError: A log-probability is missing.
    """
    if pair.policy_rejected is None:
        raise ValueError("this loss compares two completions, but policy_rejected is None")
    if pair.reference_chosen is None or pair.reference_rejected is None:
        raise ValueError("this loss needs reference_chosen and reference_rejected")
    return pair.policy_chosen - pair.reference_chosen, pair.policy_rejected - pair.reference_rejected


def both_policy_logps(pair: PairLogps) -> tuple[Tensor, Tensor]:
    """Return the ``(B,)`` log pi(y|x) of chosen and of rejected.

    Raises:
        ValueError: There is no rejected completion.
    """
    if pair.policy_rejected is None:
        raise ValueError("this loss compares two completions, but policy_rejected is None")
    return pair.policy_chosen, pair.policy_rejected


def per_token(pair: PairLogps, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return numbers of chosen and of rejected, each divided by the tokens of the completion.

    Args:
        pair: Pairs with the lengths of their completions.
        both: ``(B,)`` sums over the tokens of chosen, and of rejected.

    Raises:
        ValueError: A length is missing.
    """
    if pair.chosen_length is None or pair.rejected_length is None:
        raise ValueError("averages over tokens need chosen_length and rejected_length")
    chosen, rejected = both
    return chosen / pair.chosen_length, rejected / pair.rejected_length


def check_nll(weight: float, mean: NLLMean) -> None:
    """Check the options of a likelihood that a loss adds.

    Args:
        weight: Weight of the likelihood, ``nll_weight``.
        mean: Denominator of the likelihood, ``nll_mean``.

    Raises:
        ValueError: ``weight`` is negative or ``mean`` is unknown.
    """
    if not weight >= 0:
        raise ValueError(f"nll_weight must be >= 0, got {weight}")
    if mean not in get_args(NLLMean):
        raise ValueError(f"nll_mean must be sum, completion or batch, got {mean}")


def chosen_nll(pair: PairLogps, mean: NLLMean = "sum") -> Tensor:
    """Return the ``(B,)`` negative log-likelihood of the chosen completions.

    Args:
        pair: Log-probabilities of ``B`` pairs.
        mean: ``sum`` for -log pi(y_w|x), ``completion`` for its mean over the tokens of y_w, and ``batch`` for numbers
            whose mean over the pairs is the mean over all tokens of all y_w. A loss that uses ``batch`` has to declare
            ``full_batch``. With soft labels, the tokens of both completions count by the probability of the label.

    Raises:
        ValueError: A mean over tokens needs the lengths, and they are missing.
    """
    if mean == "sum":
        return -pair.policy_chosen
    if pair.chosen_length is None:
        raise ValueError("a mean over tokens needs chosen_length")
    tokens = pair.chosen_length.to(pair.policy_chosen)
    if mean == "completion":
        return -pair.policy_chosen / tokens
    if pair.preference is not None and pair.rejected_length is not None:
        # The same for both outcomes of the labels, so that the losses of a step add up to those of all its tokens.
        tokens = pair.preference * tokens + (1 - pair.preference) * pair.rejected_length
    return -pair.policy_chosen / tokens.mean()
