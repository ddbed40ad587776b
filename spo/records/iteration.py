"""The ledger ``iterate.json`` of an iteration: its rounds, their state, and the run directory that measures each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from spo.errors import UserError
from spo.records import filenames
from spo.records.files import read_json, write_json
from spo.wording import finite

RoundStatus = Literal["running", "finished", "failed"]
IterationReference = Literal["previous", "first"]


class NotAnIterationError(UserError):
    """A folder that does not hold an iteration."""


@dataclass
class Round:
    """A round of an iteration.

    Attributes:
        number: Number of the round; 0 is the evaluation of the first model.
        directory: Run directory, relative to the directory of the iteration.
        measured: Run directory whose metrics stand for the round, relative as well. It differs from
            ``directory`` where the policy of the round is an extrapolation of the trained one.
        status: State of the round.
        seconds: Wall time of the round so far, in seconds.
        alarms: Sentence for each limit that the round has crossed.
    """

    number: int
    directory: str
    measured: str
    status: RoundStatus = "running"
    seconds: float = 0.0
    alarms: list[str] = field(default_factory=list)


@dataclass
class Iteration:
    """An iteration: training that starts anew from its own result, round after round.

    Attributes:
        name: Name of the kind of iteration, such as ``dpo`` or ``spin``.
        reference: Reference of each round: the policy of the ``previous`` round, or the ``first`` model.
        planned: Number of rounds that the iteration is to have, without round 0.
        rounds: Rounds that have begun, in their order.
        settings: Values of the config group ``iteration``, for people to read.
    """

    name: str
    reference: IterationReference
    planned: int
    rounds: list[Round] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Return whether every planned round has finished."""
        finished = {one.number for one in self.rounds if one.status == "finished"}
        return finished >= set(range(self.planned + 1))

    def round(self, number: int) -> Round:
        """Return the round with a number.

        Raises:
            KeyError: The round has not begun.
        """
        for one in self.rounds:
            if one.number == number:
                return one
        raise KeyError(number)


def is_iteration(directory: Path) -> bool:
    """Return whether a directory has the ledger of an iteration."""
    return (directory / filenames.ITERATION).is_file()


def iteration_of(run_dir: Path) -> Path | None:
    """Return the directory of the iteration that a run is part of, ``None`` for any other run.

    Args:
        run_dir: Run directory: that of a round, or that of an extrapolated policy within a round's.
    """
    return next((folder for folder in run_dir.absolute().parents[:2] if is_iteration(folder)), None)


def with_own_rounds(config: Any, run_dir: Path) -> Any:
    """Return the configuration of a round in which folders of the iteration are those beside the round.

    A round records where the iteration was, with the policies and samples of other rounds. After a move there may be
    nothing, or another iteration. A folder that is not beside the round keeps its path.

    Args:
        config: Recorded configuration of a run as plain values, which stay as they are.
        run_dir: Run directory as it is now.
    """
    paths = config.get("paths") if isinstance(config, Mapping) else None
    own = iteration_of(run_dir) or iteration_of(run_dir.resolve())
    if own is None or not isinstance(paths, Mapping):
        return config
    recorded = paths.get("iteration")
    if not isinstance(recorded, str) or recorded == str(own):
        return config
    return {**_with_own(config, recorded, own), "paths": {**paths, "iteration": str(own)}}


def _with_own(value: Any, recorded: str, own: Path) -> Any:
    """Return a value in which each path below one directory lies below another, if it is there."""
    if isinstance(value, Mapping):
        return {key: _with_own(one, recorded, own) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_own(one, recorded, own) for one in value]
    if isinstance(value, str) and value.startswith(f"{recorded}/"):
        moved = own / value.removeprefix(f"{recorded}/")
        return str(moved) if moved.exists() else value
    return value


def read_iteration(directory: Path) -> Iteration:
    """Return the iteration in a directory.

    Args:
        directory: Directory of the iteration, with ``iterate.json``.

    Raises:
        NotAnIterationError: The directory or the ledger is missing, or the ledger is damaged.
    """
    if not directory.is_dir():
        raise NotAnIterationError(
            f"{directory} is not a directory: give the directory of an iteration, such as outputs/iterations/NAME"
        )
    file = directory / filenames.ITERATION
    if not file.is_file():
        raise NotAnIterationError(
            f"{directory} is not the directory of an iteration: it does not have {filenames.ITERATION}, which "
            "spo iterate writes; check the path"
        )
    iteration = parse_iteration(read_json(file))
    if iteration is None:
        raise NotAnIterationError(
            f"{file} is damaged, so the rounds are unknown: move it away and run the command of the iteration again, "
            "which skips finished rounds"
        )
    return iteration


def write_iteration(directory: Path, iteration: Iteration) -> None:
    """Write the ledger of an iteration, atomically.

    Args:
        directory: Directory of the iteration; it is created.
        iteration: Iteration with its rounds so far.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / filenames.ITERATION, asdict(iteration))


def parse_iteration(content: Any) -> Iteration | None:
    """Return the iteration in the content of ``iterate.json``, ``None`` for content of another form.

    Args:
        content: JSON value. Keys that this version does not know are left out.
    """
    if not isinstance(content, dict) or not _has_types(content, {"name": str, "planned": int, "rounds": list}):
        return None
    entries = content["rounds"]
    if not isinstance(content.get("settings", {}), dict):
        return None
    if content.get("reference") not in get_args(IterationReference) or not all(map(_is_round, entries)):
        return None
    rounds = [Round(**_known(Round, entry)) for entry in entries]
    numbers = [one.number for one in rounds]
    if numbers != sorted(set(numbers)):
        return None
    return Iteration(**{**_known(Iteration, content), "rounds": rounds})


def _is_round(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _has_types(entry, {"number": int, "directory": str, "measured": str})
        and entry["number"] >= 0
        and entry.get("status", "running") in get_args(RoundStatus)
        and finite(entry.get("seconds", 0.0)) is not None
        and isinstance(entry.get("alarms", []), list)
        and all(isinstance(words, str) for words in entry.get("alarms", []))
    )


def _has_types(entry: Mapping[str, Any], types: Mapping[str, type]) -> bool:
    return all(isinstance(entry.get(key), kind) and not isinstance(entry[key], bool) for key, kind in types.items())


def _known(kind: type, entry: Mapping[str, Any]) -> dict[str, Any]:
    names = {one.name for one in fields(kind)}
    return {key: value for key, value in entry.items() if key in names}
