"""Search for the factor of an extrapolation by what it gains on selection prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import nn

from spo.errors import UserError
from spo.evaluation.judges import Judge
from spo.forward.speed import Speed
from spo.metrics.catalogue import INTERVAL_ENDS
from spo.processes import first_decides, is_first_process, share
from spo.records import filenames
from spo.records.files import read_mapping, visible_names, write_json
from spo.stages.evaluate import evaluate_selection
from spo.stages.evaluated_models import Models
from spo.stages.extrapolation_plan import NO_SCORE_MESSAGE
from spo.stages.from_config import eval_device, resolve_values
from spo.stages.prepare import Prepared, prepare_run
from spo.wording import finite, number

DOUBLING_FACTORS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Factors that a search tries in this order."""
_MAX_WORSE_FACTORS = 2
"""Number of factors in a row that are not better, after which a search does not try a larger one."""
_SCORES = ("val/win_rate", "val/reward")
"""Metrics that may choose the factor; the first one that was measured is the default."""


@dataclass(frozen=True)
class Candidate:
    """A factor that was tried.

    Attributes:
        factor: Factor of the extrapolation.
        metrics: Metrics on the selection prompts, under ``val/``.
    """

    factor: float
    metrics: Mapping[str, float]

    def score(self, metric: str) -> float:
        """Return the value of a metric, minus infinity where it is not a finite number."""
        value = finite(self.metrics.get(metric))
        return -math.inf if value is None else value


def best_candidate(candidates: Sequence[Candidate], metric: str) -> Candidate:
    """Return the candidate with the highest score, among equal ones that with the smallest factor.

    Args:
        candidates: Candidates in any order.
        metric: Key of the score.
    """
    return max(candidates, key=lambda candidate: (candidate.score(metric), -candidate.factor))


def search_factor(measure: Callable[[float], Candidate], metric: str) -> list[Candidate]:
    """Try growing factors until the score stops growing, then those halfway between the best and its neighbors.

    Args:
        measure: Function from a factor to its candidate.
        metric: Key of the score.

    Returns:
        All candidates by ascending factor.
    """
    tried = [measure(DOUBLING_FACTORS[0])]
    best, worse = tried[0], 0
    for factor in DOUBLING_FACTORS[1:]:
        tried.append(measure(factor))
        is_better = tried[-1].score(metric) > best.score(metric)
        best, worse = (tried[-1], 0) if is_better else (best, worse + 1)
        if worse == _MAX_WORSE_FACTORS:
            break
    place = tried.index(best)
    neighbors = [*tried[max(place - 1, 0) : place], *tried[place + 1 : place + 2]]
    tried += [measure((neighbor.factor + best.factor) / 2) for neighbor in neighbors]
    return sorted(tried, key=lambda candidate: candidate.factor)


def choose_factor(
    cfg: DictConfig, weights: Callable[[float], Path], key: Mapping[str, Any], out: Path, metric: str | None
) -> float:
    """Search for the factor on the selection prompts of a configuration, print a table, and return the best factor.

    ``search.json`` grows with each candidate, and an interrupted search resumes from it. All processes of a run call
    this together.

    Args:
        cfg: Configuration of a run without a training step, whose reference is the opponent.
        weights: Function from a factor to the folder whose ``policy/`` has the extrapolated weights.
        key: JSON-like values that determine the result, by which an interrupted search is recognized.
        out: Run directory of the result.
        metric: Key of the score, ``None`` for the first of :data:`_SCORES` that is measured.

    Raises:
        UserError: The configuration does not have a judge or selection prompts, the metric is not measured, or the
            directory holds something else.
    """
    known = first_decides(lambda: _earlier(out, key))
    values = resolve_values(cfg)
    judge: Judge | None = instantiate(values.judge, _convert_="all")
    if judge is None:
        raise UserError(NO_SCORE_MESSAGE)

    @cache
    def loaded() -> tuple[Prepared, nn.Module]:
        prepared = prepare_run(values)
        reference: nn.Module = prepared.spec.start(prepared.base)
        return prepared, reference.to(eval_device(values))

    def measure(factor: float) -> Candidate:
        if factor not in known:
            prepared, reference = loaded()
            folder = weights(factor)
            saved: nn.Module = prepared.spec.base(folder / filenames.POLICY)
            policy = saved.requires_grad_(False).to(eval_device(values))
            speed = Speed(**values.speed).resolve_for(policy, reference)
            models = Models(policy, reference, speed)
            known[factor] = share(evaluate_selection(values, prepared, folder, judge, models))
            if is_first_process():
                _record(out, key, known)
        return Candidate(factor, known[factor])

    measured = measure(DOUBLING_FACTORS[0]).metrics
    if metric is None:
        metric = next((score for score in _SCORES if score in measured), _SCORES[0])
    if metric not in measured:
        raise UserError(
            f"--select {metric}: the evaluation does not measure it on selection prompts, but "
            f"{', '.join(sorted(measured))}"
        )
    candidates = search_factor(measure, metric)
    best = best_candidate(candidates, metric)
    if is_first_process():
        _record(out, key, known, best.factor, metric)
        _print_search(candidates, metric, best)
    return best.factor


def _earlier(out: Path, key: Mapping[str, Any]) -> dict[float, dict[str, float]]:
    """Return the metrics that an interrupted search with this key measured, by factor.

    Raises:
        UserError: The directory holds something else.
    """
    found = read_mapping(out / filenames.FACTOR_SEARCH)
    if found is not None and found.get("key") == key:
        return {float(one["factor"]): one["metrics"] for one in found["candidates"]}
    if visible_names(out):
        what = "another search" if found is not None else "something else"
        raise UserError(f"{out} holds {what}: choose another --out, or move it away")
    return {}


def _record(
    out: Path,
    key: Mapping[str, Any],
    known: Mapping[float, Mapping[str, float]],
    best: float | None = None,
    metric: str | None = None,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    candidates = [{"factor": factor, "metrics": dict(known[factor])} for factor in sorted(known)]
    record = {"key": dict(key), "metric": metric, "best": best, "candidates": candidates}
    write_json(out / filenames.FACTOR_SEARCH, record)


def _print_search(candidates: Sequence[Candidate], metric: str, best: Candidate) -> None:
    """Print a table of the factors that were tried, by ascending factor, and how far the choice can be trusted."""
    console = Console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    columns = [key for key in (*_SCORES, "val/kl") if key in best.metrics]
    for name in ("factor", *columns):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in candidates:
        cells = [_cell(one, key) for key in columns]
        table.add_row(f"{one.factor:g}", *cells, "best" if one is best else "", style="bold" if one is best else "")
    console.print(table)
    console.print(
        f"The factor {best.factor:g} has the best {metric} of {len(candidates)} factors on the selection prompts. This "
        "value is too high on average. The numbers below come from the test prompts, which did not choose the factor.",
        style="dim",
    )
    if best.factor == DOUBLING_FACTORS[-1]:
        console.print(
            "The best factor is the largest one that was tried. A larger --factor may be better.",
            style="yellow",
        )


def _cell(candidate: Candidate, key: str) -> str:
    value, low, high = (finite(candidate.metrics.get(f"{key}{end}")) for end in ("", *INTERVAL_ENDS))
    if value is None:
        return "-"
    return number(value) if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
