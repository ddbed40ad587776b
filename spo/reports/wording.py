"""How numbers and texts of a run are put into words: names, units, digits, and text made safe to show."""

from __future__ import annotations

import math
from typing import Any

LABELS = {
    "alpha": "alpha",
    "beta": "beta",
    "calibration/brier": "Brier score",
    "calibration/ece": "calibration error",
    "calibration/log_loss": "calibration log loss",
    "distinct_2": "distinct-2",
    "distinct_samples": "distinct samples per prompt",
    "entropy": "entropy",
    "entropy_sequence": "sequence entropy",
    "finished": "samples that end",
    "grad_norm": "gradient norm",
    "kl": "KL to the reference",
    "length": "length",
    "health/alarms": "health alarms",
    "health/logp_drift_chosen": "drift of log-probs, chosen",
    "health/logp_drift_rejected": "drift of log-probs, rejected",
    "judge/cached": "questions the judge had answered before",
    "judge/calls": "questions to the judge",
    "judge/cost": "cost of the judge",
    "judge/tokens": "tokens of the judge",
    "judge/unanswered": "questions the judge left unanswered",
    "logps/chosen": "log-prob, chosen",
    "logps/rejected": "log-prob, rejected",
    "logps_per_token/chosen": "log-prob per token, chosen",
    "logps_per_token/rejected": "log-prob per token, rejected",
    "loss": "loss",
    "loss/preference": "preference loss",
    "loss/regularizer": "regularizer",
    "lr": "learning rate",
    "p_eos": "P(EOS) where chosen completions end",
    "repetition": "repeated 4-grams",
    "reward": "reward",
    "rewards/accuracies": "implicit reward accuracy",
    "rewards/chosen": "implicit reward, chosen",
    "rewards/margins": "implicit reward margin",
    "rewards/rejected": "implicit reward, rejected",
    "samples/reward": "reward, of few validation prompts",
    "samples/win_rate": "win rate, of few validation prompts",
    "self_bleu": "self-BLEU",
    "win_rate": "win rate",
    "win_rate_length_controlled": "win rate at equal length",
}
UNITS = {
    "calibration/log_loss": "nats per pair",
    "distinct_samples": "share of samples",
    "entropy": "nats per token",
    "entropy_sequence": "nats per sequence",
    "exact/entropy": "nats per response",
    "exact/kl_optimum": "nats per response",
    "exact/kl_reference": "nats per response",
    "exact/mass_outside": "probability",
    "finished": "share of samples",
    "health/alarms": "limits crossed",
    "health/logp_drift_chosen": "nats per token",
    "health/logp_drift_rejected": "nats per token",
    "kl": "nats per sequence",
    "length": "tokens",
    "logps/chosen": "nats per sequence",
    "logps/rejected": "nats per sequence",
    "logps_per_token/chosen": "nats per token",
    "logps_per_token/rejected": "nats per token",
    "p_eos": "probability",
    "repetition": "share of 4-grams",
    "rewards/accuracies": "share of pairs",
    "samples/win_rate": "share of prompts",
    "win_rate": "share of prompts",
    "win_rate_length_controlled": "share of prompts",
}
INTERVAL = ("_ci_low", "_ci_high")


def label(key: str) -> str:
    """Returns the name of a metric for people; ``key`` is without its ``eval/``, ``train/`` or ``val/``."""
    if key.startswith("reward/"):
        return "reward: " + key.removeprefix("reward/").replace("_", " ")
    if key.startswith("win_rate/"):
        opponent, controlled, _ = key.removeprefix("win_rate/").partition("_length_controlled")
        return f"win rate against {opponent}" + (", at equal length" if controlled else "")
    if key.startswith("prompts/"):
        return f"prompts compared with {key.removeprefix('prompts/')}"
    return LABELS.get(key, key)


def unit(key: str) -> str:
    """Returns the unit of a metric, empty where it has none; ``key`` as in :func:`label`."""
    return UNITS["win_rate"] if key.startswith("win_rate/") else UNITS.get(key, "")


def finite(value: Any) -> float | None:
    """Returns ``value`` as a float, or ``None`` where it is absent, no number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def number(value: Any, *, signed: bool = False) -> str:
    """Writes a number with three or four significant digits, so that columns of unlike sizes can still be read.

    Args:
        value: A number, or anything else: absent (``None``) is a dash, NaN and infinities are said in words.
        signed: Whether a positive number gets its plus sign, as differences do.
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if finite(value) is None:
        return "not finite"
    sign = "+" if signed else ""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):{sign},}"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:{sign}.3e}"
    if value == 0:
        return "0"
    digits = 3 if abs(value) >= 1 else 2
    return f"{value:{sign},.{max(0, digits - math.floor(math.log10(abs(value))))}f}"


def duration(name: str, value: Any) -> tuple[str, str]:
    """Moves the seconds from the name of a ``time/`` metric to its value; a speed keeps its name."""
    stem = next((name.removesuffix(end) for end in ("_seconds", "_sec", "_s") if name.endswith(end)), name)
    if finite(value) is None or "_per_" in name or stem == name:
        return name, number(value)
    return stem, f"{value:,.1f} s"


def verdict_word(verdict: float) -> str:
    """Returns who won a comparison, seen from the policy; a judge may give shares between 0 and 1."""
    return "tie" if verdict == 0.5 else "win" if verdict > 0.5 else "loss"


def win_rate_in_words(low: float | None, high: float | None) -> str:
    """Says what an interval of the win rate shows, and no more than that."""
    if low is None or high is None:
        return "No interval was recorded."
    if low > 0.5:
        return "The interval lies above 0.5: the policy beats the reference."
    if high < 0.5:
        return "The interval lies below 0.5: the policy loses to the reference."
    return "The interval holds 0.5: no difference to the reference is shown."


def clean(text: str) -> str:
    """Makes a sampled text safe to show: control characters become visible, lone surrogates a question mark."""
    pictures = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
    pictures |= {code: 0xFFFD for code in range(0x80, 0xA0)}
    return text.replace("\r\n", "\n").translate(pictures).encode("utf-8", "replace").decode("utf-8")


def shorten(text: str, limit: int) -> str:
    """Cuts a text to ``limit`` characters and says how many were left out."""
    return text if len(text) <= limit else f"{text[:limit].rstrip()} … ({len(text) - limit:,} characters more)"
