"""Sentences about a comparison, the same in the terminal, in the files and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from spo.comparison.choice import Setting
from spo.comparison.compare import Comparison, Difference
from spo.metrics.catalogue import label
from spo.metrics.trained import BUDGET_WORDS, COSTS, PREFIX, SAMPLED, cost_text
from spo.stats import Estimate
from spo.wording import number, quoted

MOST_PAIRS_NAMED = 10
"""Most pairs of methods without a difference that a text names one by one."""


def interval(estimate: Estimate | None) -> str:
    """Write an interval such as ``[0.61, 0.72]``; empty if there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"[{number(estimate.low)}, {number(estimate.high)}]"


def mean_over_seeds(setting: Setting, key: str) -> float | None:
    """Return the mean of a number over the seeds of a setting, ``None`` where a run did not record it."""
    numbers = [run.record.metric(key) for run in setting.runs]
    known = [one for one in numbers if one is not None]
    return fmean(known) if len(known) == len(numbers) else None


def describe_costs(setting: Setting) -> list[str]:
    """Write the costs of a setting in the order of ``COSTS``, as means over its seeds."""
    return [cost_text(key, mean_over_seeds(setting, key)) for key in COSTS]


def describe_training(setting: Setting) -> str:
    """Write the budget of a setting, such as ``60 steps, 480 pairs``; ranges where seeds differ."""
    found = []
    for key, words in BUDGET_WORDS.items():
        if PREFIX + key == SAMPLED:  # It is a cost, which may differ between methods.
            continue
        counts = [count for run in setting.runs if (count := run.record.metric(PREFIX + key)) is not None]
        if counts:
            lowest, highest = (f"{end:,.0f}" for end in (min(counts), max(counts)))
            found.append(f"{lowest if lowest == highest else f'{lowest} to {highest}'} {words}")
    return ", ".join(found) or "not recorded"


def describe_difference(difference: Difference, comparison: Comparison) -> str:
    """State what a difference shows, and no more than that."""
    name = label(comparison.metric_name)
    ahead, behind = quoted(difference.first), quoted(difference.second)
    if difference.p is None:
        return f"{ahead} and {behind}: too few numbers to test the difference."
    if not difference.significant:
        return f"{ahead} and {behind}: no difference in {name} is shown ({_with_p(difference)})."
    more = difference.estimate.value > 0
    if not more and comparison.baseline is None:
        ahead, behind, more = behind, ahead, True
    directed = comparison.higher is not None
    word = ("better" if more == comparison.higher else "worse") if directed else ("higher" if more else "lower")
    return f"{ahead} is {word} than {behind} in {name} ({_with_p(difference)})."


def describe_differences(comparison: Comparison) -> list[tuple[str, bool]]:
    """State each difference, and whether it is significant; of many that are not, state the number alone."""
    stated = [(describe_difference(one, comparison), one.significant) for one in comparison.differences]
    unclear = sum(not significant for _, significant in stated)
    if unclear <= MOST_PAIRS_NAMED:
        return stated
    words = (
        f"The other {unclear} differences in {label(comparison.metric_name)} are not significant; the page lists them."
    )
    return [*(one for one in stated if one[1]), (words, False)]


def _with_p(difference: Difference) -> str:
    estimate = difference.estimate
    size = number(abs(estimate.value)) if difference.significant else number(estimate.value, signed=True)
    return f"{size}, {describe_p_value(difference.p)}"


def describe_duels(comparison: Comparison) -> str:
    """State which method beats which head to head, by the corrected tests; empty where none were compared."""
    names = [method.name for method in comparison.methods]
    known = [duel for duel in comparison.duels if duel.estimate is not None]
    won = {
        name: [
            f"{quoted(duel.second)} ({duel.estimate.value:.0%} of the prompts, {describe_p_value(duel.p)})"
            for duel in known
            if duel.first == name and duel.significant and duel.estimate is not None and duel.estimate.value > 0.5
        ]
        for name in names
    }
    clear = [f"{quoted(name)} beats {join_names(others)}" for name, others in won.items() if others]
    if not known:
        return ""
    if not clear:
        return "Head to head, no method is shown to beat another."
    open_pairs = [
        f"{quoted(duel.first)} and {quoted(duel.second)}"
        for duel in known
        if not duel.significant and names.index(duel.first) < names.index(duel.second)
    ]
    if len(open_pairs) > MOST_PAIRS_NAMED:
        open_pairs = [f"the other {len(open_pairs)} pairs"]
    rest = f"; no difference is shown between {', nor between '.join(open_pairs)}" if open_pairs else ""
    return f"Head to head, {'; '.join(clear)}{rest}."


def describe_p_value(p: float | None) -> str:
    """Write a p-value; small ones become a bound, since resampling cannot tell them apart."""
    if p is None:
        return "no test"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def describe_procedure(comparison: Comparison) -> list[str]:
    """State in sentences how the numbers were computed."""
    share = f"{comparison.bootstrap.confidence:.0%}"
    seeds = f"{len(comparison.seeds)} seed{'s' if len(comparison.seeds) != 1 else ''}"
    words = [*_about_groups(comparison)]
    words += [f"Means over {seeds} and {comparison.prompts:,} test prompts, with {share} intervals over both."]
    if comparison.select is not None:
        of_each = f"The best setting of each {comparison.groups.noun}"
        words.append(f"{of_each} was selected by {comparison.select} on the selection split.")
    if comparison.differences:
        tests, name = len(comparison.differences), label(comparison.metric_name)
        corrected = f", p-values corrected for {tests} tests (Holm)" if tests > 1 else ""
        resamples = f"{comparison.bootstrap.draws:,} resamples of the prompts"
        words.append(f"Differences in {name}: {resamples}, and an analysis of variance over seeds{corrected}.")
        if tests > 1:
            words.append("Their intervals are those of each difference alone.")
    judged = sum(duel.p is not None for duel in comparison.duels) // 2
    if judged:
        corrected = f", p-values corrected for {judged} tests (Holm)" if judged > 1 else ""
        words.append(f"Head to head: win rates tested against one half{corrected}.")
    return words


def _about_groups(comparison: Comparison) -> list[str]:
    """State what the groups are made by, where they are not simply methods."""
    groups = comparison.groups
    if groups.by:
        return [f"Groups are made by {join_names(groups.by)}."]
    if groups.choices:
        return [
            f"Runs of a method that differ in their choice of {join_names(groups.choices)} are groups of their own."
        ]
    return []


def join_names(names: Sequence[str]) -> str:
    """Join names with commas and a final "and"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
