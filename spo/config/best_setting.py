"""The best setting of a method in a finished sweep, for a second sweep with more seeds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

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
    scores = {folder: score for folder, name, score in _scores(sweep) if name == method}
    if not scores:
        raise UserError(
            f"{sweep} does not have a finished run of method={method} with {SELECTION_METRIC}: run that sweep first"
        )
    config = load_yaml((max(scores, key=scores.__getitem__) / CONFIG).read_text())
    return OmegaConf.select(OmegaConf.create(config), key, throw_on_missing=True)


@cache
def _scores(sweep: str) -> list[tuple[Path, str, float]]:
    """Return each finished run with its method and its score, in the order of their names."""
    found = []
    for folder in sorted(file.parent for file in Path(sweep).glob(f"*/{METRICS}")):
        score = finite((read_mapping(folder / METRICS) or {}).get(SELECTION_METRIC))
        if score is not None and (folder / CONFIG).is_file():
            config = load_yaml((folder / CONFIG).read_text())
            found.append((folder, str(config["method"]["name"]), score))
    return found
