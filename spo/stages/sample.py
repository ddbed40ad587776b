"""``spo sample``: completions of a prompt in the terminal or as JSON, from a run or any model folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from spo.evaluation.best_of import standing_of
from spo.evaluation.judges import Judge
from spo.stages.quiet import quiet_libraries
from spo.stages.sample_request import DEFAULT_RATIO, SampleRequest, TrustedOverrides
from spo.stages.sampled_model import Completed, SampledModel, load_judge, load_sampled
from spo.wording import clean, number


def sample_command(request: SampleRequest, trusted: TrustedOverrides, *, as_json: bool) -> list[dict[str, Any]]:
    """Sample completions of a prompt, and print them.

    Args:
        request: Settings of the command.
        trusted: Overrides, and the names that the person trusts.
        as_json: True to print a JSON array and nothing else; false for text that a person reads.

    Returns:
        The rows of the array: ``prompt``, ``completion``, ``tokens`` and ``seed``; ``model`` beside another model;
        ``reward`` or ``win_rate`` of the best of several completions.

    Raises:
        UserError: A model cannot be found or loaded, the prompt is too long, or there is no judge to choose.
    """
    quiet_libraries()
    with redirect_stdout(sys.stderr):  # A program reads the array, and bars or messages would be in its way.
        models = load_sampled(request, trusted)
        judge = None if request.best_of is None else load_judge(models[0], trusted)
        rows = list(_rows(request, models, judge))
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _show(rows, request.count)
    return rows


def _rows(request: SampleRequest, models: Sequence[SampledModel], judge: Judge | None) -> Iterable[dict[str, Any]]:
    """Yield a row for each completion, those of the first model first."""
    for model in models:
        for one, standing in _completions(request, model, judge):
            row: dict[str, Any] = {
                "prompt": request.prompt,
                "completion": one.text,
                "tokens": one.tokens,
                "seed": one.seed,
            }
            yield row | ({"model": model.name} if len(models) > 1 else {}) | standing


def _completions(
    request: SampleRequest, model: SampledModel, judge: Judge | None
) -> Iterable[tuple[Completed, dict[str, float | None]]]:
    """Yield the completions of a model, each with the value by which the judge chose it.

    Completion ``i`` has the seed ``seed + i``. With a choice, the candidates of completion ``i`` have the ``best_of``
    seeds from ``seed + i * best_of`` on, so that no two completions share a candidate.
    """
    each = request.best_of or 1
    prompt = model.prompt_of(request.prompt)
    principled, alignment = None, dict[str, Any]()
    if request.principle is not None:
        principled = model.prompt_of(request.prompt, request.principle)
        ratio = DEFAULT_RATIO if request.ratio is None else request.ratio
        alignment = {"ratio": ratio, "nucleus": request.nucleus or "principled"}
    seeds = range(request.seed, request.seed + request.count * each)
    drawn = model.draw(prompt, seeds, principled, **alignment)
    for first in range(0, len(drawn), each):
        candidates = drawn[first : first + each]
        if judge is None:
            yield candidates[0], {}
        else:
            standing = standing_of(judge, prompt, [one.text for one in candidates])
            yield candidates[standing.best], {standing.measure: standing.values[standing.best]}


# --- the terminal --------------------------------------------------------------------------------------------------


def _show(rows: Sequence[dict[str, Any]], count: int) -> None:
    """Print completions below each other, and those of two models beside each other."""
    console = Console(highlight=False)
    if len(rows) == count:
        for row in rows:
            console.print(RichText(_caption(row), "bold"))
            console.print(RichText(clean(row["completion"])), soft_wrap=True)
            console.print()
        return
    table = Table(show_lines=True)
    for row in rows[::count]:
        table.add_column(RichText(clean(row["model"])), ratio=1, overflow="fold")
    for of_seed in zip(*(rows[first : first + count] for first in range(0, len(rows), count)), strict=True):
        table.add_row(
            *(RichText.assemble((_caption(row), "bold"), "\n", clean(row["completion"].strip())) for row in of_seed)
        )
    console.print(table)


def _caption(row: dict[str, Any]) -> str:
    """Return seed, length and score of a completion in one line."""
    facts = [f"seed {row['seed']}", f"{row['tokens']} token{'s' if row['tokens'] != 1 else ''}"]
    facts += [f"{name.replace('_', ' ')} {number(row[name])}" for name in ("reward", "win_rate") if name in row]
    return ", ".join(facts)
