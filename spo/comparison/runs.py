"""Finds the runs of a comparison in their directories: what each is, with which seed, and whether it can be used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from spo.errors import UserError
from spo.records import filenames
from spo.records.files import flatten, load_yaml, read_json
from spo.records.operational_keys import is_part_of_setting
from spo.records.run import RunRecord, read_run
from spo.records.sweep import read_jobs
from spo.wording import finite

_MOVED_ASIDE = re.compile(r"(.+)\.\d+")  # what `rerun=true` makes of an old run's directory


class CannotCompare(UserError):
    """What was given cannot be compared; the message says why and what to do.

    Args:
        problems: One sentence each.
        advice: What to do about all of them.
    """

    def __init__(self, problems: Sequence[str], advice: str = "") -> None:
        self.problems = list(problems)
        count = "a problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = (f"  - {problem}".replace("\n", "\n    ") for problem in self.problems)
        super().__init__("\n".join([f"the comparison has {count}:", *lines, *([advice] if advice else [])]))


@dataclass(frozen=True, eq=False)
class Run:
    """A run directory.

    Attributes:
        path: The directory.
        identity: What makes it this run, as ``identity.json`` has it.
        record: Its other files.
        seed: Its ``seed``.
        setting: Its configuration without the seed, what follows from it, and devices and the like: equal for runs that
            differ by luck alone.
        follows: Keys of the setting whose values follow from other keys.
        failure: Why it cannot be used, in words; ``None`` for a finished run.
        scores: Scores by prompt of the metrics that were asked for, so that none is worked out twice.
    """

    path: Path
    identity: Mapping[str, Any]
    record: RunRecord = field(repr=False)
    seed: int
    setting: Mapping[str, Any] = field(repr=False)
    follows: frozenset[str] = field(repr=False)
    failure: str | None
    scores: dict[str, dict[str, float]] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.path.name

    @property
    def method(self) -> str:
        """``method.name`` of its configuration."""
        return str(self.identity["config"].get("method.name", "unnamed method"))

    @property
    def key(self) -> str:
        """Equal for the seeds of one setting."""
        return json.dumps(self.setting, sort_keys=True, default=str)

    @property
    def has_all_prompts(self) -> bool:
        """Whether its prompts are no sample of others, as those of an enumerable language."""
        return str(self.setting.get("data.source._target_")).endswith(".EnumerableSource")

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Rows of the test split."""
        return on_test_split(self.record)

    @cached_property
    def evaluations(self) -> list[RunRecord]:
        """Its own evaluation, and each ``spo evaluate`` that differs from it in no number but by its opponents."""
        again = [
            read_run(file.parent) for file in sorted(self.path.glob(f"{filenames.EVALUATIONS}/*/{filenames.SAMPLES}"))
        ]
        return [self.record, *(one for one in again if _measured_with(one) == _measured_with(self.record))]

    def number(self, key: str) -> float | None:
        """A final number, or the last one of the history where the final ones do not have it."""
        value = self.record.metric(key)
        if value is None and not key.startswith("eval/"):
            known = [number for number in self.record.curve(key)[1] if number == number]
            value = known[-1] if known else None
        return value


def on_test_split(record: RunRecord) -> list[dict[str, Any]]:
    """The samples of an evaluation that are of the test split."""
    return [row for row in record.samples if row.get("split", "test") == "test"]


@dataclass
class Found:
    """Runs below the given directories.

    Attributes:
        runs: One per identity, in the order of their paths.
        problems: Jobs that left no run, in words.
        notes: What was counted once or left out, in words.
    """

    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_runs(paths: Sequence[Path]) -> Found:
    """Reads the runs of run directories and of directories that hold some, at any depth.

    Args:
        paths: Run directories, sweep directories or folders of those.

    Raises:
        CannotCompare: A path is no directory, or holds no run.
    """
    found, problems = Found(), []
    by_digest: dict[str, Run] = {}
    for path in paths:
        if not path.is_dir():
            problems.append(f"{path}: there is no such directory")
            continue
        directories = list(_run_directories(path))
        for directory in directories:
            run = _read(directory)
            if isinstance(run, str):
                found.problems.append(run)
                continue
            digest = str(run.identity.get("digest", directory.resolve()))
            known = by_digest.get(digest)
            if known is not None and known.path.resolve() != run.path.resolve():
                found.notes.append(f"{run.name} and {known.name} are the same run, and count once")
            if known is None or (known.failure is not None and run.failure is None):
                by_digest[digest] = run
        ledgers = list(_ledger_problems(path, directories))
        found.problems += ledgers
        if not directories and not ledgers:
            problems.append(f"{path}: there is no run in it (a run has an {filenames.IDENTITY})")
    if problems:
        raise CannotCompare(
            problems, "Give the directory of a sweep, or those of runs: spo compare outputs/sweeps/NAME"
        )
    found.runs = list(by_digest.values())
    return found


def _run_directories(path: Path) -> Iterator[Path]:
    if (path / filenames.IDENTITY).is_file():
        yield path
        return
    for child in sorted(path.iterdir()):
        aside = _MOVED_ASIDE.fullmatch(child.name)
        if not child.is_dir() or child.name.startswith(".") or child.name == filenames.COMPARISON:
            continue
        if aside is not None and (path / aside[1] / filenames.IDENTITY).is_file():
            continue
        yield from _run_directories(child)


def _ledger_problems(path: Path, directories: Sequence[Path]) -> Iterator[str]:
    """Jobs of a sweep that have not become a run."""
    known = {directory.resolve() for directory in directories}
    for job in read_jobs(path):
        done = job.status == "finished" or job.same_as
        if not done and (path / job.directory).resolve() not in known:
            yield f"the job {' '.join(job.overrides)} is {job.status}: {job.error or 'it has not run'}"


def _read(directory: Path) -> Run | str:
    identity = _json(directory / filenames.IDENTITY)
    if identity is None or not isinstance(identity.get("config"), dict) or "seed" not in identity["config"]:
        return f"{directory.name}: its {filenames.IDENTITY} cannot be read"
    record = read_run(directory)
    composed = _composed(directory / filenames.COMPOSED)
    of_seed = {key for key, text in composed.items() if "${seed}" in text} | {"seed"}
    config = identity["config"]
    return Run(
        path=directory,
        identity=identity,
        record=record,
        seed=config["seed"],
        setting={key: value for key, value in config.items() if key not in of_seed and is_part_of_setting(key)},
        follows=frozenset(key for key, text in composed.items() if text.startswith("${") and text.endswith("}")),
        failure=_failure(directory, record),
    )


def _measured_with(record: RunRecord) -> dict[str, Any]:
    """What the numbers of an evaluation follow from, beside the policy."""
    return {
        key: value
        for key, value in flatten(record.config).items()
        if key.partition(".")[0] in ("data", "evaluation", "judge") and is_part_of_setting(key)
    }


def _failure(directory: Path, record: RunRecord) -> str | None:
    if record.metrics is not None:
        return None
    failure = _json(directory / filenames.FAILURE)
    if failure is not None:
        return f"failed: {failure.get('error', 'no reason was recorded')}"
    steps = [step for row in record.history if (step := finite(row.get("step"))) is not None]
    return f"unfinished, at step {max(steps):,.0f}" if steps else "unfinished, before its first step"


def _composed(file: Path) -> dict[str, str]:
    """The configuration with its references left in, flat; empty where it is missing."""
    try:
        composed = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return {key: str(value) for key, value in flatten(composed).items()} if isinstance(composed, Mapping) else {}


def _json(file: Path) -> dict[str, Any] | None:
    value = read_json(file)
    return value if isinstance(value, dict) else None
