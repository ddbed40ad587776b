"""Reading a run directory in any state; notes list what is missing or damaged."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spo.records import filenames
from spo.records.files import load_yaml, parse_jsonl, read_json, read_mapping
from spo.wording import finite

log = logging.getLogger(__name__)
FILES = (filenames.CONFIG, filenames.METRICS, filenames.HISTORY, filenames.SAMPLES, filenames.PROVENANCE)


class NotARunError(FileNotFoundError):
    """A folder that does not hold a run."""


@dataclass
class RunRecord:
    """The content of a run directory.

    Attributes:
        name: Name of the directory.
        config: Resolved configuration, empty where it is missing.
        config_text: Text of ``config.yaml``.
        identifying: Configuration of the identity of the run, by dotted key, without coefficients that the method
            does not read; empty where it is missing.
        metrics: Final numbers, ``None`` where the run has not written them.
        history: One mapping per logged step.
        samples: One mapping per evaluated completion.
        provenance: Content of ``provenance.json``, empty where it is missing.
        alarms: Alarms of the health callback, each a sentence with its step.
        notes: Sentences about missing and damaged files.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    identifying: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def metric(self, key: str) -> float | None:
        """Return a final number, ``None`` where it is absent or not finite."""
        return finite((self.metrics or {}).get(key))

    def input_digest(self, key: str) -> str | None:
        """Return a digest of ``provenance.json`` such as ``pairs_sha256``, ``None`` if it was not recorded."""
        inputs = self.provenance.get("inputs")
        return inputs.get(key) if isinstance(inputs, Mapping) else None

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps and values of one key of the history, NaN where a value was not finite.

        Of a step that was logged twice, as after a resume, the last value counts.
        """
        points: dict[float, float] = {}
        for row in self.history:
            step, value = finite(row.get("step")), row.get(key)
            if step is None or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            known = finite(value)
            points[step] = math.nan if known is None else known
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def get(self, path: str) -> Any:
        """Return the value at a dotted path of the configuration, ``None`` if there is none."""
        node: Any = self.config
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node


def read_run(run_dir: Path) -> RunRecord:
    """Read the files of a run directory that exist.

    Args:
        run_dir: Run directory.

    Raises:
        NotARunError: The directory is missing, or none of its files is that of a run.
    """
    if not run_dir.is_dir():
        raise NotARunError(f"{run_dir} is not a directory; give the directory of a run, outputs/runs/... .")
    if not any((run_dir / name).is_file() for name in FILES):
        raise NotARunError(f"{run_dir} is not a run directory: it has none of {', '.join(FILES)}.")
    run = RunRecord(name=run_dir.resolve().name)
    run.config_text = _text(run, run_dir / filenames.CONFIG, "the config cannot be shown") or ""
    try:
        config = load_yaml(run.config_text)
        run.config = config if isinstance(config, dict) else {}
    except yaml.YAMLError as error:
        run.notes.append(f"{filenames.CONFIG} is not valid YAML ({str(error).splitlines()[0]}); it is shown as it is.")
    identifying = (read_mapping(run_dir / filenames.IDENTITY) or {}).get("config")
    run.identifying = identifying if isinstance(identifying, dict) else {}
    run.metrics = _mapping(run, run_dir / filenames.METRICS, "the run has not finished, so there are no final numbers")
    run.history = _rows(run, run_dir / filenames.HISTORY, "there are no curves")
    run.samples = _rows(run, run_dir / filenames.SAMPLES, "there are no samples")
    run.provenance = _mapping(run, run_dir / filenames.PROVENANCE, "where the run came from is unknown") or {}
    run.alarms = read_alarms(run_dir)
    without_step = sum(finite(row.get("step")) is None for row in run.history)
    if without_step:
        run.notes.append(f"{without_step} rows of {filenames.HISTORY} do not have a step; they are not in the curves.")
    return run


def read_alarms(run_dir: Path) -> list[str]:
    """Return the alarms of ``health.json``, which exists only where a limit was crossed."""
    try:
        return [f"step {alarm['step']}: {alarm['words']}" for alarm in read_json(run_dir / filenames.HEALTH) or []]
    except (TypeError, KeyError):  # The file holds something else.
        return []


def read_stop(run_dir: Path) -> str | None:
    """Return the sentence of ``provenance.json`` about a training that stopped early, ``None`` if there is none."""
    words = (read_mapping(run_dir / filenames.PROVENANCE) or {}).get("stopped")
    return words if isinstance(words, str) else None


def _text(run: RunRecord, path: Path, consequence: str) -> str | None:
    if not path.is_file():
        run.notes.append(f"{path.name} is missing: {consequence}.")
        return None
    return path.read_bytes().decode("utf-8", "replace")


def _mapping(run: RunRecord, path: Path, consequence: str) -> dict[str, Any] | None:
    text = _text(run, path, consequence)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        run.notes.append(f"{path.name} is damaged ({error}): {consequence}.")
        return None
    if not isinstance(value, dict):
        run.notes.append(f"{path.name} is not a JSON object: {consequence}.")
        return None
    return value


def _rows(run: RunRecord, path: Path, consequence: str) -> list[dict[str, Any]]:
    text = _text(run, path, consequence)
    if text is None:
        return []
    parsed = list(parse_jsonl(text))
    damaged = [number for number, row in parsed if row is None]
    if damaged and damaged[-1] == parsed[-1][0]:
        # A process that was killed leaves half a last line.
        run.notes.append(f"The last line of {path.name} (line {damaged.pop()}) is cut off and was skipped.")
    if damaged:
        first = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        run.notes.append(f"Damaged lines of {path.name} were skipped: {len(damaged)} (line {first}).")
    if not parsed:
        run.notes.append(f"{path.name} is empty: {consequence}.")
    return [row for _, row in parsed if row is not None]


def read_result(run_dir: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the metrics and samples of a finished run; damaged samples are left out, with a warning."""
    samples = RunRecord(run_dir.name)
    rows = _rows(samples, run_dir / filenames.SAMPLES, "there are no samples")
    for note in samples.notes:
        log.warning("%s (in %s; spo evaluate makes samples again)", note, run_dir)
    return read_mapping(run_dir / filenames.METRICS) or {}, rows
