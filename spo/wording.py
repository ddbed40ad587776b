"""Numbers and texts for people: digits, durations, and text that is safe to show."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


def finite(value: Any) -> float | None:
    """Return ``value`` as a float, or ``None`` if it is absent, not a number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON integers may be larger than any float.
        return None
    return number if math.isfinite(number) else None


def number(value: Any, *, signed: bool = False) -> str:
    """Write a number with three or four significant digits, so that columns of different sizes stay readable.

    Args:
        value: Number or anything else; ``None`` becomes a dash, NaN and infinities become words.
        signed: Whether positive numbers get a plus sign, as differences do.
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
    """Move the unit of seconds from the name of a ``time/`` metric to its value; a speed keeps its name.

    Args:
        name: Key without ``time/``.
        value: Value of the metric.
    """
    stem = next((name.removesuffix(end) for end in ("_seconds", "_sec", "_s") if name.endswith(end)), name)
    if finite(value) is None or "_per_" in name or stem == name:
        return name, number(value)
    return stem, f"{value:,.1f} s"


def verdict_word(verdict: float) -> str:
    """Return win, tie or loss of the policy; a judge may give shares between 0 and 1."""
    return "tie" if verdict == 0.5 else "win" if verdict > 0.5 else "loss"


def describe_verdict(verdict: float, comparisons: int) -> str:
    """State the result of a sample: win, tie or loss, or how many of several comparisons it won.

    Args:
        verdict: Mean verdict; ties count as half.
        comparisons: Number of completions of the reference that the sample was compared with.
    """
    return verdict_word(verdict) if comparisons == 1 else f"wins {verdict * comparisons:g} of {comparisons}"


def describe_win_rate(low: float | None, high: float | None) -> str:
    """State what an interval of the win rate shows."""
    if low is None or high is None:
        return "No interval was recorded."
    if low > 0.5:
        return "The interval lies above 0.5: the policy beats the reference."
    if high < 0.5:
        return "The interval lies below 0.5: the policy loses to the reference."
    return "The interval contains 0.5: no difference to the reference is shown."


def clean(text: str) -> str:
    """Make a sampled text safe to show: control characters become visible, lone surrogates become question marks."""
    # Unicode has a visible picture for each control character, from U+2400 on.
    pictures = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
    pictures |= {code: 0xFFFD for code in range(0x80, 0xA0)}
    return text.replace("\r\n", "\n").translate(pictures).encode("utf-8", "replace").decode("utf-8")


def shorten(text: str, limit: int) -> str:
    """Cut a text to ``limit`` characters and state how many were omitted."""
    return text if len(text) <= limit else f"{text[:limit].rstrip()} … ({len(text) - limit:,} characters more)"


def quoted(name: str) -> str:
    """Return a name as a part of a sentence: in quotation marks if it contains a comma."""
    return f'"{name}"' if "," in name else name


def value_text(value: Any) -> str:
    """Write a value of the configuration for people: a class of the package without its module."""
    if isinstance(value, float):
        return f"{value:g}"
    return value.rpartition(".")[2] if isinstance(value, str) and value.startswith("spo.") else str(value)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean WORD?`` for the known word that is closest, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
