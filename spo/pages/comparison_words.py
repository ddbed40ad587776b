"""Sentences about a comparison, the same in the terminal, in the files and on the page."""

from __future__ import annotations

from spo.comparison.choice import Setting
from spo.comparison.compare import Comparison, Difference
from spo.metrics.catalogue import label
from spo.metrics.trained import BUDGET_WORDS, PREFIX
from spo.stats import Estimate
from spo.wording import number


def interval(estimate: Estimate | None) -> str:
    """Write an interval such as ``[0.61, 0.72]``; empty if there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"[{number(estimate.low)}, {number(estimate.high)}]"


def describe_training(setting: Setting) -> str:
    """Write the budget of a setting, such as ``60 steps, 480 pairs, 0 tokens sampled``; ranges where seeds differ."""
    found = []
    for key, words in BUDGET_WORDS.items():
        counts = [count for run in setting.runs if (count := run.record.metric(PREFIX + key)) is not None]
        if counts:
            lowest, highest = (f"{end:,.0f}" for end in (min(counts), max(counts)))
            found.append(f"{lowest if lowest == highest else f'{lowest} to {highest}'} {words}")
    return ", ".join(found) or "not recorded"


def describe_difference(difference: Difference, comparison: Comparison) -> str:
    """State what a difference shows, and no more than that."""
    name = label(comparison.metric_name)
    if difference.p is None:
        return f"{difference.first} and {difference.second}: too few numbers to test the difference."
    if not difference.significant:
        return f"{difference.first} and {difference.second}: no difference in {name} is shown ({_with_p(difference)})."
    ahead, behind = difference.first, difference.second
    more = difference.estimate.value > 0
    if not more and comparison.baseline is None:
        ahead, behind, more = behind, ahead, True
    directed = comparison.higher is not None
    word = ("better" if more == comparison.higher else "worse") if directed else ("higher" if more else "lower")
    return f"{ahead} is {word} than {behind} in {name} ({_with_p(difference)})."


def _with_p(difference: Difference) -> str:
    estimate = difference.estimate
    size = number(abs(estimate.value)) if difference.significant else number(estimate.value, signed=True)
    return f"{size}, {describe_p_value(difference.p)}"


def describe_p_value(p: float | None) -> str:
    """Write a p-value; small ones become a bound, since resampling cannot tell them apart."""
    if p is None:
        return "no test"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def describe_procedure(comparison: Comparison) -> list[str]:
    """State in sentences how the numbers were computed."""
    share = f"{comparison.bootstrap.confidence:.0%}"
    seeds = f"{len(comparison.seeds)} seed{'s' if len(comparison.seeds) != 1 else ''}"
    words = [f"Means over {seeds} and {comparison.prompts:,} test prompts, with {share} intervals over both."]
    if comparison.select is not None:
        words.append(f"The best setting of each method was selected by {comparison.select} on the selection split.")
    if comparison.differences:
        tests, name = len(comparison.differences), label(comparison.metric_name)
        corrected = f", p-values corrected for {tests} tests (Holm)" if tests > 1 else ""
        words.append(f"Differences in {name}: paired bootstrap of {comparison.bootstrap.draws:,} resamples{corrected}.")
        if tests > 1:
            words.append("Their intervals are those of each difference alone.")
    return words


def join_names(names: list[str]) -> str:
    """Join names with commas and a final "and"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
