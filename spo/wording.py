"""How numbers and texts are put into words: digits, durations, and text made safe to show."""

from __future__ import annotations

import math
from typing import Any


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
