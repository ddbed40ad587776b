"""Write ``comparison.html``: one self-contained page, the picture of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from spo.comparison.compare import Comparison, Difference, Method
from spo.comparison.runs import Run
from spo.metrics.catalogue import comparisons, label, unit
from spo.metrics.trained import COSTS, cost_text
from spo.pages.charts import marker
from spo.pages.comparison_curves import curves
from spo.pages.comparison_figures import frontier, headline, hues, win_matrix
from spo.pages.comparison_files import PAGE, columns
from spo.pages.comparison_paths import path_curves, paths_chart
from spo.pages.comparison_settings import settings_chart
from spo.pages.comparison_words import (
    describe_costs,
    describe_difference,
    describe_duels,
    describe_p_value,
    describe_procedure,
    describe_training,
    interval,
    join_names,
    mean_over_seeds,
)
from spo.pages.dashboard import Dashboard, load_spec
from spo.pages.run_page import TEMPLATES
from spo.pages.selfcontained import write_selfcontained
from spo.wording import describe_verdict, finite, number, quoted, shorten

_SAMPLES, _TEXT_CHARACTERS = 6, 1200


def write_page(comparison: Comparison, folder: Path, dashboard: Dashboard | None = None) -> Path:
    """Write the page, over an earlier one.

    Args:
        comparison: Comparison to show.
        folder: Folder of the page; it is created.
        dashboard: Dashboard whose curves are drawn; ``None`` for the shipped one.

    Returns:
        The path of the page.
    """
    paths, path_data = path_curves(comparison)
    groups, curve_data = curves(comparison, dashboard or load_spec(), without=[data["key"] for data in path_data])
    hue = hues(comparison)
    return write_selfcontained(
        folder / PAGE,
        TEMPLATES / "comparison.html.j2",
        styles=[TEMPLATES / "report.css", TEMPLATES / "comparison.css"],
        scripts=[TEMPLATES / "report.js", TEMPLATES / "comparison.js"],
        chart_data=[*path_data, *curve_data],
        comparison=comparison,
        title=_title(comparison),
        verdict=" ".join(filter(None, [_verdict(comparison), describe_duels(comparison)])),
        hue=hue,
        key={name: _key(number) for name, number in hue.items()},
        headline=headline(comparison),
        differences=[_difference(one, comparison) for one in comparison.differences],
        columns=[_column(name) for name in columns(comparison)],
        rows=[_row(method, comparison) for method in comparison.methods],
        frontiers=[(cost, drawn) for cost in ("kl", "entropy") if (drawn := frontier(comparison, cost)) is not None],
        paths=[chart for group in paths for chart in group["charts"]],
        plane=paths_chart(comparison),
        matrix=win_matrix(comparison),
        charts=[(method, settings_chart(comparison, method)) for method in comparison.methods],
        groups=groups,
        samples=_samples(comparison),
        how=describe_procedure(comparison),
        label=label,
        number=number,
        costs=COSTS,
        describe_costs=describe_costs,
        describe_training=describe_training,
    )


def _key(hue: int) -> Markup:
    return Markup(f'<svg class="mark-key" viewBox="-1.6 -1.6 3.2 3.2" aria-hidden="true">{marker(hue, 0, 0, 1)}</svg>')


def _title(comparison: Comparison) -> str:
    return join_names([quoted(method.name) for method in comparison.methods])


def _verdict(comparison: Comparison) -> str:
    """State which method is better than which, by the corrected tests."""
    if len(comparison.methods) == 1:
        return ""
    name = label(comparison.metric_name)
    best = comparison.methods[0].name
    leader = quoted(best)
    if comparison.baseline is not None:
        found = [one for one in comparison.differences if one.significant]
        if not found:
            return f"No difference in {name} to {quoted(comparison.baseline)} is shown."
        return " ".join(describe_difference(one, comparison) for one in found)
    if not any(one.significant for one in comparison.differences):
        return f"No difference in {name} between {_title(comparison)} is shown."
    of_best = [one for one in comparison.differences if best in (one.first, one.second)]
    behind = [one.second if one.first == best else one.first for one in of_best if one.significant]
    level = [one.second if one.first == best else one.first for one in of_best if not one.significant]
    word = "higher" if comparison.higher is None else "better"
    if not behind:
        return f"{leader} is not shown to be {word} than any other in {name}."
    ahead = f"{leader} is {word} than {join_names(list(map(quoted, behind)))} in {name}"
    return f"{ahead}; no difference to {join_names(list(map(quoted, level)))} is shown." if level else f"{ahead}."


def _difference(one: Difference, comparison: Comparison) -> dict[str, Any]:
    return {
        "first": one.first,
        "second": one.second,
        "value": number(one.estimate.value, signed=True),
        "interval": interval(one.estimate),
        "p": describe_p_value(one.p),
        "significant": one.significant,
        "words": describe_difference(one, comparison),
        "paired": one.paired,
    }


def _column(name: str) -> dict[str, str]:
    return {"name": name, "label": label(name), "unit": unit(name)}


def _row(method: Method, comparison: Comparison) -> dict[str, Any]:
    cells = []
    for name in columns(comparison):
        one = method.estimates.get(name)
        cells.append(
            {
                "sort": "" if one is None else repr(one.value),
                "value": number(None if one is None else one.value),
                "interval": interval(one),
            }
        )
    spent = {key: mean_over_seeds(method.best, key) for key in COSTS}
    costs = [{"sort": "" if one is None else repr(one), "value": cost_text(key, one)} for key, one in spent.items()]
    return {"method": method, "costs": costs, "cells": cells}


# --- samples -------------------------------------------------------------------------------------------------------


def _samples(comparison: Comparison) -> list[dict[str, Any]]:
    """Choose completions for the same prompts: the first ones, and those where the best two methods differ most."""
    runs = {method.name: method.best.runs[0] for method in comparison.methods}
    rows = {name: _first_samples(run) for name, run in runs.items()}
    first = next(iter(rows.values()))
    common = [prompt for prompt in first if all(prompt in one for one in rows.values())]
    return [_sample(prompt, {name: one[prompt] for name, one in rows.items()}) for prompt in _chosen(common, rows)]


def _first_samples(run: Run) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for row in run.samples:
        found.setdefault(str(row.get("prompt_id")), row)
    return found


def _chosen(prompts: Sequence[str], rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    part = _SAMPLES // 3
    best = list(rows)[:2]
    lead = {}
    for prompt in prompts:
        rewards = [finite(rows[name][prompt].get("reward")) for name in best]
        if len(rewards) == 2 and rewards[0] is not None and rewards[1] is not None:
            lead[prompt] = rewards[0] - rewards[1]
    ranked = sorted(lead, key=lambda prompt: -lead[prompt])
    wanted = dict.fromkeys([*prompts[:part], *ranked[:part], *ranked[::-1][:part]] if ranked else prompts[:_SAMPLES])
    return [prompt for prompt in prompts if prompt in wanted]


def _sample(prompt: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    any_row = next(iter(rows.values()))
    sides = [_side("reference", any_row.get("reference_completion"), any_row.get("reference_reward"), "")]
    sides += [_side(name, row.get("completion"), row.get("reward"), _verdict_of(row)) for name, row in rows.items()]
    return {"prompt": shorten(str(any_row.get("prompt", prompt)), _TEXT_CHARACTERS), "sides": sides}


def _verdict_of(row: Mapping[str, Any]) -> str:
    verdict = finite(row.get("verdict"))
    return "" if verdict is None else describe_verdict(verdict, len(comparisons(row)))


def _side(name: str, text: Any, reward: Any, verdict: str) -> dict[str, Any]:
    return {
        "name": name,
        "text": None if text is None else shorten(str(text).strip(), _TEXT_CHARACTERS),
        "reward": None if finite(reward) is None else number(reward),
        "verdict": verdict or None,
    }
