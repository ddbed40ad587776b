"""The runs of a comparison, read from their directories: method, setting, seed, and whether each is finished."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from spo.errors import UserError
from spo.records import filenames
from spo.records.files import flatten, load_yaml, read_json
from spo.records.operational_keys import is_in, is_part_of_setting
from spo.records.run import RunRecord, read_run
from spo.records.sweep import read_jobs
from spo.wording import finite

# `rerun=true` renames the directory of an old run to such a name.
_MOVED_ASIDE = re.compile(r"(.+)\.\d+")
# Words of an interpolation that may be keys, such as those of `${oc.select:method.default_beta,0.1}`.
_REFERENCES = re.compile(r"[A-Za-z_.][\w.]*")


class CannotCompare(UserError):
    """Runs that cannot be compared; the message states why and what to do.

    Args:
        problems: Reasons, one sentence each.
        advice: Sentence that says how to solve the problems.
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
        path: Run directory.
        identity: Content of ``identity.json``: configuration, code, and digests of the inputs.
        record: Other files of the run.
        seed: Random seed of the run.
        composed: Flat configuration with its interpolations; empty where the file is missing.
        overrides: Overrides of the run: those of its job in the ledger of the sweep, or those of its command.
        of_seed: Keys whose values follow from the seed, and the seed itself.
        setting: Configuration without the seed, keys derived from the seed, and operational keys such as devices.
            Runs with equal settings differ by chance alone.
        follows: Keys of the setting whose values are interpolations of other keys.
        failure: Reason why the run cannot be compared; ``None`` for a finished run.
        scores: Cache of scores by metric and prompt.
    """

    path: Path
    identity: Mapping[str, Any]
    record: RunRecord = field(repr=False)
    seed: int
    composed: Mapping[str, str] = field(repr=False)
    overrides: Sequence[str] = field(repr=False)
    of_seed: frozenset[str] = field(repr=False)
    setting: Mapping[str, Any] = field(repr=False)
    follows: frozenset[str] = field(repr=False)
    failure: str | None
    scores: dict[str, dict[str, float]] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        """Return the name of the directory."""
        return self.path.name

    @property
    def method(self) -> str:
        """Return ``method.name`` of the configuration."""
        return str(self.config.get("method.name", "unnamed method"))

    @property
    def config(self) -> Mapping[str, Any]:
        """Return the flat configuration of the identity, without keys that change no result."""
        config: Mapping[str, Any] = self.identity["config"]
        return config

    @property
    def key(self) -> str:
        """Return a text that is equal for all seeds of one setting."""
        return json.dumps(self.setting, sort_keys=True, default=str)

    @property
    def has_all_prompts(self) -> bool:
        """Return whether the prompts are all there are, as in an enumerable language, and not a sample of others."""
        return str(self.setting.get("data.source._target_")).endswith(".EnumerableSource")

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Return the rows of the test split."""
        return on_test_split(self.record)

    @cached_property
    def rewards(self) -> dict[str, dict[int, float]]:
        """Return the rewards of the test split by prompt and number of the sample; empty without rewards."""
        found: dict[str, dict[int, float]] = {}
        for row in self.samples:
            if (reward := finite(row.get("reward"))) is not None:
                found.setdefault(str(row.get("prompt_id")), {})[int(row.get("sample_index") or 0)] = reward
        return found

    @cached_property
    def has_single_samples(self) -> bool:
        """Return whether no prompt of the test split has several samples."""
        prompts = [row.get("prompt_id") for row in self.samples]
        return len(prompts) == len(set(prompts))

    @cached_property
    def evaluations(self) -> list[RunRecord]:
        """Return the run's own evaluation, and each ``spo evaluate`` that differs from it in opponents or seed only."""
        again = [
            read_run(file.parent) for file in sorted(self.path.glob(f"{filenames.EVALUATIONS}/*/{filenames.SAMPLES}"))
        ]
        return [self.record, *(one for one in again if _evaluation_config(one) == _evaluation_config(self.record))]

    @property
    def trained_steps(self) -> float | None:
        """Return the optimizer steps that the run trained; runs of version 0.1.0 state them in their history alone."""
        logged = [step for row in self.record.history if (step := finite(row.get("step"))) is not None]
        counted = self.record.metric("trained/steps")
        return counted if counted is not None else max(logged, default=finite(self.setting.get("trainer.max_steps")))

    @property
    def trained_pairs(self) -> float | None:
        """Return the pairs that the run trained on; ``None`` for a run of version 0.1.0, which did not count them."""
        return self.record.metric("trained/pairs")

    def number(self, key: str) -> float | None:
        """Return a final number, or the last one of the history if the final one is missing."""
        value = self.record.metric(key)
        if value is None and not key.startswith("eval/"):
            known = [number for number in self.record.curve(key)[1] if number == number]
            value = known[-1] if known else None
        return value


def on_test_split(record: RunRecord) -> list[dict[str, Any]]:
    """Return the samples of an evaluation that belong to the test split.

    Runs of earlier versions do not name the split if their data is a file.
    """
    return [row for row in record.samples if row.get("split") in (None, "test")]


@dataclass
class Found:
    """Runs that were found below some directories.

    Attributes:
        runs: Runs, one per identity, in the order of their paths.
        problems: Sentences about jobs that did not leave a run.
        notes: Sentences about runs that were counted once or skipped.
    """

    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_runs(paths: Sequence[Path]) -> Found:
    """Read run directories, and directories that contain them at any depth.

    Args:
        paths: Run directories, sweep directories, or folders of those.

    Raises:
        CannotCompare: If a path is not a directory, or does not contain a run.
    """
    found, problems = Found(), []
    by_digest: dict[str, Run] = {}
    jobs: dict[Path, Mapping[str, Sequence[str]]] = {}
    for path in paths:
        if not path.is_dir():
            problems.append(f"{path}: there is no such directory")
            continue
        directories = list(_run_directories(path))
        for directory in directories:
            sweep = directory.resolve().parent
            if sweep not in jobs:
                jobs[sweep] = _overrides_of_jobs(sweep)
            run = _read(directory, jobs[sweep].get(directory.resolve().name))
            if isinstance(run, str):
                found.problems.append(run)
                continue
            digest = str(run.identity.get("digest", directory.resolve()))
            known = by_digest.get(digest)
            if known is not None and known.path.resolve() != run.path.resolve():
                found.notes.append(f"{run.name} and {known.name} are the same run, which counts once")
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
    """Describe the jobs of a sweep that did not leave a run."""
    known = {directory.resolve() for directory in directories}
    try:
        jobs = read_jobs(path)
    except UserError as error:
        yield str(error)
        return
    for job in jobs:
        done = job.status == "finished" or job.same_as
        if not done and (path / job.directory).resolve() not in known:
            yield f"the job {' '.join(job.overrides)} is {job.status}: {job.error or 'it has not run'}"


def _overrides_of_jobs(sweep: Path) -> Mapping[str, Sequence[str]]:
    """Return the overrides of the jobs of a sweep by directory; nothing where there is no readable ledger."""
    try:
        return {job.directory: job.overrides for job in read_jobs(sweep) if job.same_as is None}
    except UserError:  # The ledger is a problem of its own where the sweep is compared.
        return {}


def _overrides_of_command(record: RunRecord) -> Sequence[str]:
    """Return the overrides of the command that started a run; of a sweep, those that all of its jobs share."""
    try:
        return [word for word in shlex.split(str(record.provenance.get("command", ""))) if "," not in word]
    except ValueError:
        return []


def followers(composed: Mapping[str, str], sources: Collection[str]) -> frozenset[str]:
    """Return keys, the keys below them, and every key whose interpolation leads to one of them.

    Args:
        composed: Flat configuration with its interpolations.
        sources: Keys, or parts of the configuration such as ``data``.
    """
    found, before = set(sources), -1
    while len(found) > before:
        before = len(found)
        found |= {key for key, text in composed.items() if any(is_in(one, found) for one in _references(key, text))}
    return frozenset(found)


def _references(key: str, text: str) -> Iterator[str]:
    """Yield the keys that an interpolation refers to; one dot at the beginning stands for the parent of ``key``."""
    if "${" in text:
        for word in _REFERENCES.findall(text):
            yield f"{key.rpartition('.')[0]}{word}" if word.startswith(".") else word


def _read(directory: Path, overrides: Sequence[str] | None) -> Run | str:
    identity = _json(directory / filenames.IDENTITY)
    if identity is None or not isinstance(identity.get("config"), dict) or "seed" not in identity["config"]:
        return f"{directory.name}: its {filenames.IDENTITY} cannot be read"
    record = read_run(directory)
    composed = _composed(directory / filenames.COMPOSED)
    of_seed = followers(composed, {"seed"})
    config = identity["config"]
    return Run(
        path=directory,
        identity=identity,
        record=record,
        seed=config["seed"],
        composed=composed,
        overrides=_overrides_of_command(record) if overrides is None else overrides,
        of_seed=of_seed,
        setting={key: value for key, value in config.items() if not is_in(key, of_seed) and is_part_of_setting(key)},
        follows=frozenset(key for key, text in composed.items() if text.startswith("${") and text.endswith("}")),
        failure=_failure(directory, record),
    )


def _evaluation_config(record: RunRecord) -> dict[str, Any]:
    """Return the configuration that the numbers of an evaluation depend on, besides the policy and the seed."""
    return {
        key: value
        for key, value in flatten(record.config).items()
        if key.partition(".")[0] in ("data", "evaluation", "judge")
        and key != "evaluation.seed"
        and is_part_of_setting(key)
    }


def _failure(directory: Path, record: RunRecord) -> str | None:
    if record.metrics is not None:
        return None
    failure = _json(directory / filenames.FAILURE)
    if failure is not None:
        kind = "unfinished" if failure.get("kind") == "interrupted" else "failed"
        return f"{kind}: {failure.get('error', 'no reason was recorded')}"
    steps = [step for row in record.history if (step := finite(row.get("step"))) is not None]
    return f"unfinished, at step {max(steps):,.0f}" if steps else "unfinished, before its first step"


def _composed(file: Path) -> dict[str, str]:
    """Return the flat configuration with its interpolations; empty where the file is missing."""
    try:
        composed = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return {key: str(value) for key, value in flatten(composed).items()} if isinstance(composed, Mapping) else {}


def _json(file: Path) -> dict[str, Any] | None:
    value = read_json(file)
    return value if isinstance(value, dict) else None
