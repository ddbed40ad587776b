"""What makes a comparison unfair: every reason is found, not the first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spo.comparison.runs import Found, Run

# Parts of a configuration that have to be the same for all: what is trained on, from where, and how it is judged.
_DATA, _START, _JUDGING = ("data",), ("model", "sft"), ("evaluation", "judge")
_BUDGET = ("trainer.max_steps", "data.batch_size")
_SHOWN = 6


@dataclass(frozen=True)
class Problem:
    """Why a comparison is not fair.

    Attributes:
        text: A sentence.
        methods: Whose numbers it concerns; none for all.
    """

    text: str
    methods: frozenset[str] = frozenset()


def find_problems(found: Found) -> list[Problem]:
    """Finds everything that is unfair about comparing the methods of some runs."""
    runs = found.runs
    finished = [run for run in runs if run.failure is None]
    problems = [Problem(text) for text in found.problems]
    problems += [Problem(f"{run.name} is {run.failure}", frozenset({run.method})) for run in runs if run.failure]
    problems += [*_twice(finished), *_budgets(runs), *_seeds(runs)]
    problems += _mixed_digests(finished)
    problems += [*_mixed(finished, "the data", _DATA), *_mixed(finished, "the start", _START)]
    problems += [*_mixed(finished, "how it is judged", _JUDGING), *_prompts(finished)]
    return problems


def _by(runs: Iterable[Run], key: Callable[[Run], Any]) -> dict[Any, list[Run]]:
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def _names(items: Sequence[Any]) -> str:
    shown = ", ".join(map(str, items[:_SHOWN]))
    return f"{shown} and {len(items) - _SHOWN} more" if len(items) > _SHOWN else shown


def _methods(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(run.method for run in runs))


def _twice(runs: Sequence[Run]) -> list[Problem]:
    """Runs of one setting and seed that are different runs, by their code or the bytes they read."""
    return [
        Problem(
            f"{_names([run.name for run in some])} have one setting and seed and are different runs "
            f"({_why(some)}): leave one out",
            frozenset({some[0].method}),
        )
        for some in _by(runs, lambda run: (run.method, run.key, run.seed)).values()
        if len(some) > 1
    ]


def _why(runs: Sequence[Run]) -> str:
    words = {"code": "the code of spo", "data": "the bytes of the data", "weights": "the model", "adapter": "adapter"}
    differing = [text for key, text in words.items() if len({run.identity.get(key) for run in runs}) > 1]
    return f"{' and '.join(differing)} differ" if differing else "their configurations differ"


def _budgets(runs: Sequence[Run]) -> list[Problem]:
    """Methods of which more was tried than of others, or which saw more pairs."""
    problems = []
    trials = {name: len({run.key for run in some}) for name, some in _by(runs, lambda run: run.method).items()}
    if len(set(trials.values())) > 1:
        counted = ", ".join(f"{name} {count}" for name, count in trials.items())
        most = max(trials.values())
        problems.append(
            Problem(
                f"the numbers of settings tried differ: {counted}; the best of more is better by luck alone",
                frozenset(name for name, count in trials.items() if count == most),
            )
        )
    spent = {
        name: sorted({tuple(run.setting.get(key) for key in _BUDGET) for run in some}, key=str)
        for name, some in _by(runs, lambda run: run.method).items()
    }
    if len({str(one) for one in spent.values()}) > 1:
        said = ", ".join(
            f"{name} {' and '.join(f'{steps} steps of {size} pairs' for steps, size in some)}"
            for name, some in spent.items()
        )
        problems.append(Problem(f"the methods were trained for different lengths: {said}"))
    return problems


def _seeds(runs: Sequence[Run]) -> list[Problem]:
    """Settings without a seed that others have."""
    wanted = {run.seed for run in runs}
    problems = []
    for name, some in _by(runs, lambda run: run.method).items():
        settings = _by(some, lambda run: run.key).values()
        lacking: dict[str, int] = {}
        for of_setting in settings:
            missing = sorted(wanted - {run.seed for run in of_setting})
            if missing:
                words = f"seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
                lacking[words] = lacking.get(words, 0) + 1
        for words, count in lacking.items():
            which = f"{count} of its {len(settings)} settings" if len(settings) > 1 else "it"
            problems.append(Problem(f"{name}: {which} lack{'s' if which == 'it' else ''} {words}", frozenset({name})))
    return problems


def _mixed_digests(runs: Sequence[Run]) -> list[Problem]:
    problems = []
    for key, words in (("pairs_sha256", "the preference pairs"), ("reference_sha256", "the reference models")):
        groups = _by(runs, lambda run: (run.record.provenance.get("inputs") or {}).get(key))  # noqa: B023
        if len(groups) > 1:
            said = "; ".join(
                f"{str(digest)[:8] if digest else 'not recorded'}: {_names([run.name for run in some])}"
                for digest, some in groups.items()
            )
            problems.append(Problem(f"{words} are not the same for all runs ({said})"))
    return problems


def _mixed(runs: Sequence[Run], what: str, parts: Sequence[str]) -> list[Problem]:
    """Keys of parts of the configuration that have to be the same for all."""
    keys = {key for run in runs for key in run.setting if key.partition(".")[0] in parts and key not in _BUDGET}
    values: Mapping[str, set[str]] = {
        key: {json.dumps(run.setting.get(key), sort_keys=True, default=str) for run in runs} for key in sorted(keys)
    }
    differing = [f"{key} ({' or '.join(sorted(some))})" for key, some in values.items() if len(some) > 1]
    return [Problem(f"{what} differs between runs: {_names(differing)}")] if differing else []


def _prompts(runs: Sequence[Run]) -> list[Problem]:
    groups = _by(runs, lambda run: frozenset((row.get("prompt_id"), row.get("sample_index")) for row in run.samples))
    if len(groups) <= 1:
        return []
    said = "; ".join(f"{len(rows):,} samples: {_names([run.name for run in some])}" for rows, some in groups.items())
    return [Problem(f"the test prompts are not the same for all runs ({said})")]
