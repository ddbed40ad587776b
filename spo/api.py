"""The stable Python interface: what the commands do, as functions. ``import spo`` makes them available lazily."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from spo.comparison.compare import Comparison
    from spo.records.run import RunRecord

PathLike = str | Path
"""A path as text or as an object."""


def compose(
    overrides: Sequence[str] = (), *, run_dir: PathLike | None = None, config_dir: PathLike | None = None
) -> DictConfig:
    """Return the configuration that ``spo train OVERRIDES`` would run.

    Args:
        overrides: Overrides as on the command line, such as ``["method=dpo", "beta=0.2"]``.
        run_dir: Directory of the run; ``None`` for a new one in ``outputs/runs``.
        config_dir: Folder with more members of the config groups, as with ``--config-dir``.

    Raises:
        UserError: An override cannot be used.
    """
    from spo.config.compose import compose

    return compose(overrides, config_dir=config_dir, run_dir=run_dir)


def train(cfg: DictConfig) -> dict[str, float]:
    """Train and evaluate the run that a configuration describes, or read its result if it is finished.

    Args:
        cfg: Configuration of :func:`compose`.

    Returns:
        The final metrics, by the keys of ``metrics.json``.

    Raises:
        UserError: The configuration has problems, or the directory contains another run.
    """
    from spo.stages.train import train

    return train(cfg)


def iterate(cfg: DictConfig) -> dict[str, float]:
    """Train the rounds of an iteration, or those of them that are not finished.

    Args:
        cfg: Configuration of :func:`compose` with a member of the group ``iteration``, such as
            ``compose(["iteration=dpo"], run_dir=DIRECTORY)``.

    Returns:
        The final metrics of the last round.

    Raises:
        UserError: The configuration has problems, or the directory contains another iteration.
    """
    from spo.config.iterations import check_command_fits
    from spo.stages.iterate import iterate

    check_command_fits("iterate", [cfg])
    return iterate(cfg)


def evaluate(run_dir: PathLike, overrides: Sequence[str] = (), *, allow: Sequence[str] = ()) -> dict[str, float]:
    """Evaluate the policy of a finished run again; the files of the run itself do not change.

    Args:
        run_dir: Directory of the run.
        overrides: Overrides of the groups ``data``, ``evaluation`` and ``judge``.
        allow: Targets, modules, and paths that the directory may use, as with ``--allow``.

    Returns:
        The metrics of this evaluation.

    Raises:
        UserError: The run does not have a policy, an override belongs to another group, or the directory asks for
            something that needs ``allow``.
    """
    from spo.stages.evaluate import evaluate_command

    return evaluate_command(Path(run_dir), list(overrides), list(allow))


def compare(
    paths: PathLike | Sequence[PathLike],
    *,
    by: str | Sequence[str] = (),
    metric: str | None = None,
    select: str | None = None,
    baseline: str | None = None,
    anyway: bool = False,
) -> Comparison:
    """Compare the methods of some runs, or other groups, each with its best setting, without writing files.

    Args:
        paths: Sweep directories or run directories.
        by: Keys whose values make a group: config groups and keys of the configuration, as a list or as a text with
            commas such as ``"method,data.num_pairs"``. By default a group is a method. A method whose runs chose
            different members of a config group, such as two regularizers, is one group for each.
        metric: Metric of ``metrics.json`` that ranks methods; ``None`` for the win rate, or the reward without one.
        select: Metric of the selection split that chooses settings; ``None`` for the win rate there.
        baseline: Name of the method or group that every other one is compared with; ``None`` for all pairs.
        anyway: Whether to continue with an unfair comparison, which is then marked.

    Raises:
        UserError: The runs cannot be compared, or not fairly.
    """
    from spo.comparison.compare import compare
    from spo.comparison.runs import find_runs

    return compare(find_runs(_paths(paths)), by=by, metric=metric, select=select, baseline=baseline, anyway=anyway)


def load_run(run_dir: PathLike) -> RunRecord:
    """Read the files of a run, finished or not: configuration, metrics, history, samples and provenance.

    Args:
        run_dir: Directory of the run.

    Raises:
        FileNotFoundError: The directory does not contain a run.
    """
    from spo.records.run import read_run

    return read_run(Path(run_dir))


def load_runs(paths: PathLike | Sequence[PathLike]) -> Any:
    """Read runs into a table with one row per run.

    The columns are ``run`` (the path), ``failure`` (``None`` for a finished run), the resolved configuration by its
    dotted keys, and the metrics by theirs.

    Args:
        paths: Run directories, sweep directories, or folders that contain them.

    Returns:
        A pandas ``DataFrame`` where pandas is installed, else a list of dictionaries.

    Raises:
        UserError: A path does not contain a run.
    """
    from spo.comparison.runs import find_runs
    from spo.records.files import flatten

    rows = [
        {
            "run": str(run.path),
            "failure": run.failure,
            **flatten(run.record.config),
            **(run.record.metrics or {}),
        }
        for run in find_runs(_paths(paths)).runs
    ]
    try:
        import pandas
    except ModuleNotFoundError:
        return rows
    return pandas.DataFrame(rows)


def _paths(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
