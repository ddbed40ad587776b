"""The start of a command: in this process, or in one process for each device of this machine.

What takes seconds to import is imported late, so that a wrong command is answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spo.config.plan import Plan, check_plan
from spo.errors import SET_RUN, placed_by
from spo.processes import first_decides, place
from spo.runs.another_run import refuse_another_run


def start_run(
    command: str,
    arguments: Sequence[str],
    planned: Plan,
    train: Callable[[DictConfig], Any],
    note: Callable[[str], None],
) -> int:
    """Train the only job of a plan, and return the exit status.

    Args:
        command: Name of the command.
        arguments: Arguments of the command.
        planned: Plan of a single run.
        train: Function of the configuration.
        note: Function that is given a line for a person before the work that takes seconds.
    """
    cfg = planned.jobs[0].cfg
    if place().world_size > 1:
        from spo.runs.launch import fit_to_processes
        from spo.stages.devices import join_processes

        fit_to_processes(planned.composed)
        join_processes(cfg)
        # Each process has read the clock, so their directories differ.
        cfg.paths.run = first_decides(lambda: cfg.paths.run)
        planned.composed.hydra.run.dir = cfg.paths.run
    first_decides(lambda: refuse_another_run(Path(cfg.paths.run), cfg))
    from spo.runs.launch import launch_run

    with placed_by(SET_RUN, Path(cfg.paths.run)):
        directory = cfg.paths.run.replace("'", r"\'")
        words = [command, *arguments, f"hydra.run.dir='{directory}'"]
        if (status := _supervised(words, cfg, Path(cfg.paths.run))) is not None:
            return status
        first_decides(lambda: check_plan(planned, note))
        launch_run(planned, train)
    return 0


def start_resume(
    arguments: Sequence[str], run_dir: Path, overrides: Sequence[str], allow: Sequence[str], config_dir: str | None
) -> int:
    """Resume a run, and return the exit status.

    Args:
        arguments: Arguments of ``spo train``.
        run_dir: Run directory.
        overrides: Overrides that a resumed run may have.
        allow: Targets, modules and paths of the configuration that may be used although it came with the directory.
        config_dir: Folder with further members of the groups.
    """
    from spo.runs.resume import changed_config

    cfg = changed_config(run_dir, overrides, allow, config_dir)
    if (status := _supervised(["train", *arguments], cfg, run_dir)) is not None:
        return status
    from spo.stages.train import resume

    resume(run_dir, overrides, allow, config_dir)
    return 0


def start_evaluation(
    arguments: Sequence[str], run_dir: Path, overrides: Sequence[str], allow: Sequence[str], config_dir: str | None
) -> int:
    """Evaluate a run, and return the exit status.

    The devices of the training do not matter. Several processes start only where an override asks for them.

    Args:
        arguments: Arguments of ``spo evaluate``.
        run_dir: Directory of a finished run.
        overrides: Overrides that an evaluation may have.
        allow: Targets, modules and paths of the configuration that may be used although it came with the directory.
        config_dir: Folder with further members of the groups.
    """
    wanted = [text.partition("=")[2] for text in overrides if text.startswith("trainer.devices=")]
    if place().world_size == 1 and wanted and wanted[-1].isdigit() and int(wanted[-1]) > 1:
        from spo.runs.supervise import supervise

        return supervise(["evaluate", *arguments], int(wanted[-1]), 1, None)
    from spo.stages.evaluate import evaluate_command

    evaluate_command(run_dir, overrides, allow, config_dir)
    return 0


def _supervised(words: Sequence[str], cfg: DictConfig, run_dir: Path) -> int | None:
    """Return the exit status of the processes of a run; ``None`` if this process trains, alone or as one of them."""
    from spo.runs.launch import count_devices
    from spo.runs.supervise import supervise

    if place().world_size > 1 or (devices := count_devices(cfg)) == 1:
        return None
    nodes = int(cfg.trainer.num_nodes)
    return supervise(words, devices // nodes, nodes, run_dir)
