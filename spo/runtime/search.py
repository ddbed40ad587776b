"""A search by Optuna: a sweeper for Hydra that asks for settings, has them run, and tells what they came to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, ValueType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spo.reports.wording import finite
from spo.runtime.config import parse, parser
from spo.runtime.errors import UserError
from spo.runtime.rundir import METRICS, read_json, write_json
from spo.runtime.sweep import Ledger
from spo.runtime.unread import unread
from spo.seeds import derive_seed

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

TARGET = "hydra_plugins.spo.OptunaSweeper"
RESULT, LOCK = "optimization.json", ".optuna.lock"
_GOALS = ("maximize", "minimize")
# Where one of these is searched itself, every coefficient may be read.
_DECIDE = ("method", "regularizer", "regularizer.weight")


def register() -> None:
    """Makes the sweeper known to Hydra, which takes sweepers only by a name that begins with ``hydra_plugins``."""
    Plugins.instance().class_name_to_class[TARGET] = OptunaSweeper


# --- what is searched, and for what --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """What a search looks for.

    Attributes:
        metric: of ``metrics.json``, measured on the selection split.
        direction: ``"maximize"`` or ``"minimize"``.
        constraints: metrics, with the most each may be.
    """

    metric: str
    direction: str
    constraints: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Objective:
        """From the node of the configuration."""
        return cls(str(node["metric"]), str(node["direction"]), dict(node.get("constraints") or {}))

    def problems(self) -> Iterator[str]:
        """What is wrong with it, in words."""
        for key, metric in (("metric", self.metric), *(("constraints", name) for name in self.constraints)):
            if not metric.startswith("val/"):
                yield (
                    f"hydra.sweeper.objective.{key}: {metric} cannot be searched for: settings are chosen on the "
                    "selection split (val/...), so that the test split (eval/...) stays unseen until the result"
                )
        if self.direction not in _GOALS:
            yield f"hydra.sweeper.objective.direction={self.direction}: choose {' or '.join(_GOALS)}"
        for name, most in self.constraints.items():
            if isinstance(most, bool) or not isinstance(most, int | float):
                yield f"hydra.sweeper.objective.constraints: {name}={most}: must be the most that {name} may be"


@dataclass(frozen=True)
class Space:
    """The overrides of a search: those that stay, and those that vary, by key in Hydra's grammar."""

    fixed: list[str]
    varied: dict[str, Override]

    @classmethod
    def of(cls, params: Mapping[str, Any], overrides: Sequence[str], not_read: Sequence[str]) -> Space:
        """Of the sweeper's ``params`` and the command line, whose keys replace those of the same name.

        Args:
            params: what is searched.
            overrides: of the command line.
            not_read: coefficients that the method does not read, so that they are not searched.

        Raises:
            UserError: one of them cannot be read.
        """
        texts = [*(f"{key}={value}" for key, value in params.items()), *overrides]
        parsed = {one.get_key_element(): one for one in map(parse, texts) if not one.is_hydra_override()}
        varied = {key: one for key, one in parsed.items() if one.is_sweep_override()}
        if not any(key in _DECIDE for key in varied):
            parsed = {key: one for key, one in parsed.items() if key.partition(".")[0] not in not_read}
            varied = {key: one for key, one in varied.items() if key in parsed}
        fixed = [f"{key}={one.get_value_element_as_str()}" for key, one in parsed.items() if key not in varied]
        return cls(fixed, varied)

    def ends(self, key: str) -> list[str]:
        """The values of a key between which the search moves: both ends of a range, or every choice."""
        override = self.varied[key]
        value = override.value()
        if isinstance(value, IntervalSweep):
            return [str(value.start), str(value.end)]
        values = _choices(override)
        return [values[0], values[-1]] if isinstance(value, RangeSweep) else values

    def corners(self) -> list[list[str]]:
        """Overrides of jobs in which each key takes each of its :meth:`ends` at least once."""
        ends = {key: self.ends(key) for key in self.varied}
        longest = max(map(len, ends.values()), default=1)
        varied = ([f"{key}={values[i % len(values)]}" for key, values in ends.items()] for i in range(longest))
        return [[*one, *self.fixed] for one in varied]

    def distributions(self) -> dict[str, BaseDistribution]:
        """What Optuna draws from.

        Raises:
            UserError: a key has an impossible range.
        """
        return {key: _distribution(override) for key, override in self.varied.items()}

    def job(self, values: Mapping[str, Any]) -> list[str]:
        """The overrides of one job."""
        return [*(f"{key}={values[key]}" for key in self.varied), *self.fixed]


def _choices(override: Override) -> list[str]:
    override.config_loader = parser().config_loader
    return list(override.sweep_string_iterator())


def _distribution(override: Override) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    try:
        if isinstance(value, IntervalSweep):
            kind = IntDistribution if isinstance(value.start, int) and isinstance(value.end, int) else FloatDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        values = _choices(override)
        if isinstance(value, RangeSweep) and not value.shuffle:
            whole = override.value_type is ValueType.RANGE_SWEEP and isinstance(value.range(), range)
            kind = IntDistribution if whole else FloatDistribution
            convert = int if whole else float
            low, high = sorted(map(convert, (values[0], values[-1])))
            return kind(low, high, step=abs(convert(value.step)))
        return CategoricalDistribution(values)
    except (ValueError, IndexError, HydraException) as error:
        raise UserError(f"{override.input_line}: {error}") from error


def problems(cfg: DictConfig, overrides: Sequence[str]) -> tuple[list[str], Space | None]:
    """What is wrong with a search, in words, and its space where that can be read.

    Args:
        cfg: composed, with Hydra's node.
        overrides: of the command line.
    """
    sweeper = cfg.hydra.sweeper
    found = list(Objective.of(sweeper.objective).problems())
    for key in ("n_trials", "n_jobs"):
        if isinstance(sweeper[key], bool) or not isinstance(sweeper[key], int) or sweeper[key] < 1:
            found.append(f"hydra.sweeper.{key}={sweeper[key]}: must be a whole number of at least 1")
    try:
        space = Space.of(sweeper.params or {}, overrides, unread(cfg))
        space.distributions()
    except UserError as error:
        return [*found, str(error)], None
    if not space.varied:
        found.append("hydra.sweeper.params: nothing to search; give a range, such as beta=interval(0.01,1)")
    return found, space


# --- the sweeper ---------------------------------------------------------------------------------------------------


class OptunaSweeper(Sweeper):
    """Runs the trials that Optuna proposes, in batches, through the launcher.

    The study lies in the sweep directory. The same command goes on with it: trials that were interrupted are run again
    with the values they had, and the proposals are those that an uninterrupted search would have made.

    Args:
        n_trials: in all, failed ones included.
        n_jobs: trials proposed and run at a time.
        seed: of the proposals.
        objective: see :class:`Objective`.
        params: what is searched, by key, in Hydra's grammar.
        sampler: an Optuna sampler by ``_target_``, without its seed.
        storage: URL of Optuna's database.
    """

    def __init__(
        self,
        n_trials: int,
        n_jobs: int,
        seed: int,
        objective: DictConfig,
        params: DictConfig,
        sampler: DictConfig,
        storage: str,
    ) -> None:
        self.n_trials, self.n_jobs, self.seed = n_trials, n_jobs, seed
        self.objective, self.params, self.sampler, self.storage = Objective.of(objective), params, sampler, storage

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before :meth:`sweep`."""
        self.not_read = unread(config)
        self.directory = Path(str(config.hydra.sweep.dir)).absolute()
        self.ledger = Ledger(self.directory)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Called by Hydra with the overrides of the command line.

        Raises:
            UserError: the directory holds another search, or a process is at work on this one.
        """
        self.space = Space.of(self.params, arguments, self.not_read)
        with self._study() as study:
            while trials := self._next(study):
                jobs = [self.space.job(trial.params) for trial in trials]
                self.launcher.launch(jobs, initial_job_idx=trials[0].number)
                for trial, job in zip(trials, jobs, strict=True):
                    self._tell(study, trial, job)
                self._write(study)
            self._write(study)
            self._show(study)

    @contextmanager
    def _study(self) -> Iterator[optuna.Study]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        settings = json.dumps(
            {
                "objective": self.objective.metric,
                "direction": self.objective.direction,
                "constraints": self.objective.constraints,
                "space": {key: str(value) for key, value in self.space.distributions().items()},
                "fixed": [text for text in self.space.fixed if not text.startswith(("launcher=", "rerun="))],
            },
            sort_keys=True,
        )
        try:
            lock = FileLock(self.directory / LOCK).acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process is at work on the search in {self.directory}: wait for it") from None
        with lock:
            study = optuna.create_study(
                study_name="spo",
                storage=self.storage,
                direction=self.objective.direction,
                load_if_exists=True,
            )
            before = study.user_attrs.get("settings", settings)
            if before != settings:
                raise UserError(
                    f"{self.directory} holds another search:\n  there: {before}\n  now:   {settings}\n"
                    "choose another hydra.sweep.dir"
                )
            study.set_user_attr("settings", settings)
            yield study

    def _next(self, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        """Trials to run: those that a process left when it died, else new ones."""
        from optuna.trial import TrialState

        begun = study.get_trials(states=(TrialState.RUNNING,))
        for trial in begun:
            if trial.params.keys() != self.space.varied.keys():  # it died while proposing
                study.tell(trial.number, state=TrialState.FAIL)
        if waiting := [trial for trial in begun if trial.params.keys() == self.space.varied.keys()]:
            return waiting[: self.n_jobs]
        proposed: list[optuna.trial.FrozenTrial] = []
        while len(proposed) < self.n_jobs and (number := len(study.trials)) < self.n_trials:
            # Seeded by the number of the trial, so that a search that is interrupted draws nothing twice.
            study.sampler = instantiate(self.sampler, seed=derive_seed("search", self.seed, number) % 2**32)
            study.ask(self.space.distributions())
            proposed.append(study.trials[number])
        return proposed

    def _tell(self, study: optuna.Study, trial: optuna.trial.FrozenTrial, job: Sequence[str]) -> None:
        import optuna

        live = optuna.trial.Trial(study, trial._trial_id)
        entry = self.ledger.entry(job)
        if entry is not None:
            live.set_user_attr("directory", entry.directory)
        if entry is None or entry.status != "finished":
            live.set_user_attr("error", (entry and entry.error) or "its process died")
            study.tell(live, state=optuna.trial.TrialState.FAIL)
            return
        metrics = read_json(self.directory / entry.directory / METRICS) or {}
        wanted = [self.objective.metric, *self.objective.constraints]
        if missing := [name for name in wanted if finite(metrics.get(name)) is None]:
            known = ", ".join(sorted(name for name in metrics if name.startswith("val/")))
            words = f"its metrics have no finite {' and no '.join(missing)}; they have {known}"
            self.ledger.note(job, entry.directory, "failed", words)
            live.set_user_attr("error", words)
            study.tell(live, state=optuna.trial.TrialState.FAIL)
            return
        for name, most in self.objective.constraints.items():
            live.set_user_attr(name, metrics[name])
            live.set_constraint(name, metrics[name] - most)
        study.tell(live, metrics[self.objective.metric])

    def _rows(self, study: optuna.Study) -> list[dict[str, Any]]:
        return [
            {
                "number": trial.number,
                "params": trial.params,
                "directory": trial.user_attrs.get("directory"),
                "state": trial.state.name.lower(),
                "value": trial.value,
                "constraints": {name: trial.user_attrs.get(name) for name in self.objective.constraints},
                "feasible": trial.value is not None and all(value <= 0 for value in trial.constraints.values()),
                "error": trial.user_attrs.get("error"),
            }
            for trial in study.get_trials()
        ]

    def _best(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        choose = max if self.objective.direction == "maximize" else min
        return choose((row for row in rows if row["feasible"]), key=lambda row: row["value"], default=None)

    def _write(self, study: optuna.Study) -> None:
        rows = self._rows(study)
        objective = {
            "metric": self.objective.metric,
            "direction": self.objective.direction,
            "constraints": dict(self.objective.constraints),
        }
        write_json(self.directory / RESULT, {"objective": objective, "best": self._best(rows), "trials": rows})

    def _show(self, study: optuna.Study) -> None:
        rows = self._rows(study)
        best = self._best(rows)
        limits = self.objective.constraints
        table = Table(box=None, pad_edge=False)
        table.add_column("trial", justify="right")
        for key in (*self.space.varied, self.objective.metric, *(f"{name} <= {limits[name]:g}" for name in limits)):
            table.add_column(key, justify="right")
        table.add_column("")
        for row in rows:
            values = [_number(row["params"].get(key)) for key in self.space.varied]
            values += [_number(row["value"]), *(_number(row["constraints"][name]) for name in limits)]
            said = row["state"] if row["state"] != "complete" else "" if row["feasible"] else "out of bounds"
            style = "bold green" if row is best else "red" if row["state"] == "fail" else ""
            table.add_row(
                Text(str(row["number"])), *map(Text, values), Text("best" if row is best else said), style=style
            )
        console = Console()
        console.print(f"\nsearch {self.directory}", soft_wrap=True, markup=False, highlight=False)
        console.print(table)
        for row in rows:
            if row["error"]:
                console.print(Text(f"failed: trial {row['number']}: {row['error']}", "red"), soft_wrap=True)
        if best is None:
            console.print("no trial has finished within the bounds")
        else:
            chosen = " ".join(f"{key}={value}" for key, value in best["params"].items())
            console.print(
                f"best of {len(rows)}: {chosen}\n  in {self.directory / best['directory']}",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
