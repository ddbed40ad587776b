"""The comparison as files: JSON with everything, CSV and Markdown with the table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spo.comparison.compare import Comparison, Difference, Duel, Method
from spo.metrics.catalogue import find, label, shown_in
from spo.metrics.trained import BUDGET_WORDS, COSTS, PREFIX
from spo.pages.comparison_words import (
    describe_costs,
    describe_difference,
    describe_duels,
    describe_procedure,
    describe_training,
    interval,
    mean_over_seeds,
)
from spo.records.files import to_json, write_text
from spo.stats import Estimate
from spo.wording import clean, number

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# Keys of what a run spent, each of them once.
_SPENT = tuple(dict.fromkeys([*(f"{PREFIX}{key}" for key in BUDGET_WORDS), *COSTS]))
JSON, CSV, MARKDOWN, PAGE = "comparison.json", "table.csv", "comparison.md", "comparison.html"


def columns(comparison: Comparison) -> list[str]:
    """Return the metrics of the table that some method has: the main one first, those of single losses last."""
    measured = (name for method in comparison.methods for name in method.estimates)
    own = sorted({name for name in measured if find(name) is None})
    order = dict.fromkeys((comparison.metric_name, *shown_in("comparison"), *own))
    return [name for name in order if any(name in method.estimates for method in comparison.methods)]


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """Return everything that the comparison found as plain values."""
    return {
        "metric": comparison.metric,
        "by": list(comparison.groups.by),
        "select": comparison.select,
        "baseline": comparison.baseline,
        "prompts": comparison.prompts,
        "seeds": list(comparison.seeds),
        "confidence": comparison.bootstrap.confidence,
        "bootstrap_draws": comparison.bootstrap.draws,
        "problems": [{"text": one.text, "methods": sorted(one.methods)} for one in comparison.problems],
        "notes": list(comparison.notes),
        "methods": [_method(method) for method in comparison.methods],
        "reference": dict(comparison.reference),
        "differences": [_difference(one, comparison) for one in comparison.differences],
        "win_matrix": [_duel(one) for one in comparison.duels],
        "head_to_head": describe_duels(comparison),
    }


def _method(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "title": method.title,
        "trials": len(method.settings),
        "best": method.best.label,
        "seeds": method.best.seeds,
        "trained": _trained(method),
        "metrics": {name: _estimate(one) for name, one in method.estimates.items()},
        "problems": [problem.text for problem in method.problems],
        "settings": [
            {
                "label": setting.label,
                "values": dict(setting.values),
                "selection": setting.selection,
                **{key.rpartition("/")[2]: mean_over_seeds(setting, key) for key in COSTS},
                "best": setting is method.best,
                "runs": [{"directory": run.name, "seed": run.seed} for run in setting.runs],
            }
            for setting in method.settings
        ],
    }


def _trained(method: Method) -> dict[str, float | None]:
    """Return the mean budget and costs of the runs of the best setting; ``None`` where a run did not record them."""
    return {key.rpartition("/")[2]: mean_over_seeds(method.best, key) for key in _SPENT}


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {key: value for key, value in asdict(estimate).items() if key != "p"}


def _difference(one: Difference, comparison: Comparison) -> dict[str, Any]:
    return {
        "first": one.first,
        "second": one.second,
        **_estimate(one.estimate),
        "p": one.estimate.p,
        "p_corrected": one.p,
        "significant": one.significant,
        "paired_by_seed": one.paired,
        "words": describe_difference(one, comparison),
    }


def _duel(one: Duel) -> dict[str, Any]:
    return {
        "first": one.first,
        "second": one.second,
        "win_rate": one.estimate and _estimate(one.estimate),
        "p": one.estimate and one.estimate.p,
        "p_corrected": one.p,
        "significant": one.significant,
    }


def to_csv(comparison: Comparison) -> str:
    """Write the table, one row per method, with the ends of intervals in columns of their own."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = columns(comparison)
    ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer.writerow(["method", "setting", "trials", "seeds", "prompts", *_SPENT, *ends, "problems"])
    for method in comparison.methods:
        numbers: list[float | None] = list(_trained(method).values())
        for name in names:
            one = method.estimates.get(name)
            numbers += [None, None, None] if one is None else [one.value, one.low, one.high]
        seeds = " ".join(map(str, method.best.seeds))
        problems = " | ".join(problem.text for problem in method.problems)
        texts = map(_as_text, (method.name, method.best.label, seeds, problems))
        name_cell, setting_cell, seeds_cell, problems_cell = texts
        counts = [len(method.settings), seeds_cell, comparison.prompts]
        writer.writerow([name_cell, setting_cell, *counts, *numbers, problems_cell])
    return text.getvalue()


def _as_text(cell: str) -> str:
    """Return a cell that no spreadsheet reads as a formula; a number stays as it is."""
    cell = clean(cell.replace("\r", " "))  # The csv module does not quote it, and it would end the row.
    is_formula = (cell[:1] == "\t" or cell.strip()[:1] in ("=", "+", "-", "@")) and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if is_formula else cell


def to_markdown(comparison: Comparison) -> str:
    """Write the table, the differences and the procedure, for a paper or an issue."""
    return "\n".join(_markdown(comparison)) + "\n"


def _markdown(comparison: Comparison) -> Iterator[str]:
    if comparison.problems:
        yield "> **This comparison is not fair.** It was made with `--anyway`:"
        yield from (f"> - {_cell(problem.text)}" for problem in comparison.problems)
        yield ""
    names = columns(comparison)
    costs = [f"{name} ({unit})" for name, unit in COSTS.values()]
    heads = [comparison.groups.noun, "best setting", "trials", "seeds", "trained", *costs]
    yield _row([*heads, *(label(name) for name in names)])
    yield _row(["---", "---", "---:", "---:", "---", *["---:"] * (len(costs) + len(names))])
    for method in comparison.methods:
        cells = [method.name + (" (!)" if method.problems else ""), method.best.label]
        cells += [str(len(method.settings)), str(len(method.best.seeds)), describe_training(method.best)]
        cells += describe_costs(method.best)
        for name in names:
            one = method.estimates.get(name)
            cells.append("–" if one is None else f"{number(one.value)} {interval(one)}".rstrip())
        yield _row(cells)
    yield ""
    yield from (f"- {_cell(describe_difference(one, comparison))}" for one in comparison.differences)
    if duels := describe_duels(comparison):
        yield f"- {_cell(duels)}"
    if comparison.differences:
        yield ""
    yield " ".join(describe_procedure(comparison))
    yield from (f"\n{_cell(note)}" for note in comparison.notes)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return clean(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def write_files(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write all files except the page.

    Args:
        comparison: Comparison to write.
        folder: Folder of the files; it is created.

    Returns:
        The paths of the files by name.
    """
    texts: Mapping[str, str] = {
        JSON: to_json(to_dict(comparison), indent=2, ensure_ascii=False) + "\n",
        CSV: to_csv(comparison),
        MARKDOWN: to_markdown(comparison),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)
    return {name: folder / name for name in texts}
