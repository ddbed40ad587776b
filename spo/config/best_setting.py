"""The best setting of a method in a finished sweep, for a second sweep with more seeds."""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from spo.errors import UserError
from spo.records.filenames import CONFIG, METRICS
from spo.records.files import load_yaml, read_mapping
from spo.wording import finite

SELECTION_METRIC = "val/win_rate"
"""Metric on the selection split by which a setting is chosen."""


def best_setting(sweep: str, method: str, key: str) -> Any:
    """Return the value of a key in the run of a method that has the largest win rate on the selection split.

    Args:
        sweep: Folder of the sweep.
        method: Name of the method.
        key: Configuration key.

    Raises:
        UserError: The sweep does not have a finished run of the method.
    """
    metrics = sorted(Path(sweep).glob(f"*/{METRICS}"))
    runs = [run for file in metrics if (run := _run(file, file.stat().st_mtime_ns)) and run.method == method]
    if not runs:
        raise UserError(
            f"{sweep} does not have a finished run of method={method} with {SELECTION_METRIC}: run that sweep first"
        )
    best = max(runs, key=attrgetter("score"))
    return OmegaConf.select(OmegaConf.create(best.config), key, throw_on_missing=True)


class _Run(NamedTuple):
    method: str
    score: float
    config: dict[str, Any]


# The time of the last change makes a run that was repeated in the meantime another one.
@cache
def _run(metrics: Path, changed_ns: int) -> _Run | None:
    """Return a finished run, ``None`` if it does not have the score or its configuration."""
    score, config = finite((read_mapping(metrics) or {}).get(SELECTION_METRIC)), metrics.parent / CONFIG
    if score is None or not config.is_file():
        return None
    content = load_yaml(config.read_text())
    return _Run(str(content["method"]["name"]), score, content)
