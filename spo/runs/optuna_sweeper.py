"""A search by Optuna: a sweeper for Hydra that asks for settings, runs them, and reports their results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from filelock import FileLock, Timeout
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spo import signals
from spo.config.coefficients import unused_coefficients
from spo.errors import UserError
from spo.records import filenames
from spo.records.files import read_json, write_json
from spo.runs.identity import plugins
from spo.runs.ledger import Ledger
from spo.seeds import derive_seed
from spo.wording import finite

if TYPE_CHECKING:
    import optuna

from spo.config.search_space import SWEEPER_TARGET, Objective, Space


def register() -> None:
    """Register the sweeper with Hydra, which accepts only names that begin with ``hydra_plugins``."""
    Plugins.instance().class_name_to_class[SWEEPER_TARGET] = OptunaSweeper


class OptunaSweeper(Sweeper):
    """A sweeper that runs the trials Optuna proposes, in batches, through the launcher.

    The study lies in the sweep directory. The same command resumes it: interrupted trials run again with the values
    they had, and the proposals are those that an uninterrupted search would have made.

    Args:
        n_trials: Number of trials in all, failed ones included.
        n_jobs: Number of trials proposed and run at a time.
        seed: Seed of the proposals.
        objective: Node of an :class:`Objective`.
        params: Ranges and choices by key, in Hydra's grammar.
        sampler: Node of an Optuna sampler, without its seed.
        storage: URL of Optuna's database.
    """

    launcher: Launcher  # not None: Hydra calls setup before sweep

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
        """Prepare the launcher; Hydra calls this before :meth:`sweep`."""
        self.unused = unused_coefficients(config)
        self.plugins = {name: source.sha256 for name, source in plugins(config, self.unused).items()}
        self.directory = Path(str(config.hydra.sweep.dir)).absolute()
        self.ledger = Ledger(self.directory)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the search; Hydra calls this with the overrides of the command line.

        Args:
            arguments: Overrides of the command line.

        Raises:
            UserError: The directory holds another search, or another process works on this one.
        """
        self.space = Space.of(self.params, arguments, self.unused)
        with self._study() as study:
            while trials := self._next(study):
                jobs = [self.space.job(trial.params) for trial in trials]
                self.launcher.launch(jobs, initial_job_idx=trials[0].number)
                signals.raise_received()  # The trials are unfinished, and a repeated command resumes them.
                for trial, job in zip(trials, jobs, strict=True):
                    self._record(study, trial, job)
                self._write(study)
            self._write(study)
            self._show(study)

    @contextmanager
    def _study(self) -> Iterator[optuna.Study]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        settings = json.dumps(
            {
                **({"plugins": self.plugins} if self.plugins else {}),  # Older searches do not have this key.
                "objective": self.objective.metric,
                "direction": self.objective.direction,
                "constraints": self.objective.constraints,
                "space": {key: str(value) for key, value in self.space.distributions().items()},
                "fixed": [text for text in self.space.fixed if not text.startswith(("launcher=", "rerun="))],
            },
            sort_keys=True,
        )
        try:
            lock = FileLock(self.directory / filenames.OPTIMIZATION_LOCK).acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process works on the search in {self.directory}: wait for it") from None
        with lock:
            study = optuna.create_study(
                study_name="spo",
                storage=self.storage,
                direction=cast(Literal["minimize", "maximize"], self.objective.direction),  # as problems() found
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
        """Return the trials to run next: those that a dead process left, else new ones."""
        from optuna.trial import TrialState

        begun = study.get_trials(states=(TrialState.RUNNING,))
        for trial in begun:
            if trial.params.keys() != self.space.varied.keys():  # The process died while proposing.
                study.tell(trial.number, state=TrialState.FAIL)
        if waiting := [trial for trial in begun if trial.params.keys() == self.space.varied.keys()]:
            return waiting[: self.n_jobs]
        proposed: list[optuna.trial.FrozenTrial] = []
        while len(proposed) < self.n_jobs and (number := len(study.trials)) < self.n_trials:
            # The number of the trial is part of the seed, so that a resumed search draws nothing twice.
            study.sampler = instantiate(self.sampler, seed=derive_seed("search", self.seed, number) % 2**32)
            study.ask(self.space.distributions())
            proposed.append(study.trials[number])
        return proposed

    def _record(self, study: optuna.Study, trial: optuna.trial.FrozenTrial, job: Sequence[str]) -> None:
        import optuna

        live = optuna.trial.Trial(study, trial._trial_id)
        entry = self.ledger.entry(job)
        if entry is not None:
            live.set_user_attr("directory", entry.directory)
        if entry is None or entry.status != "finished":
            live.set_user_attr("error", (entry and entry.error) or "its process died")
            study.tell(live, state=optuna.trial.TrialState.FAIL)
            return
        metrics = read_json(self.directory / entry.directory / filenames.METRICS) or {}
        wanted = [self.objective.metric, *self.objective.constraints]
        if missing := [name for name in wanted if finite(metrics.get(name)) is None]:
            known = ", ".join(sorted(name for name in metrics if name.startswith("val/")))
            words = f"its metrics do not have a finite {' or '.join(missing)}; they have {known}"
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
        write_json(
            self.directory / filenames.OPTIMIZATION, {"objective": objective, "best": self._best(rows), "trials": rows}
        )

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
            state = row["state"] if row["state"] != "complete" else "" if row["feasible"] else "out of bounds"
            style = "bold green" if row is best else "red" if row["state"] == "fail" else ""
            table.add_row(
                Text(str(row["number"])), *map(Text, values), Text("best" if row is best else state), style=style
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
