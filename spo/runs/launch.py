"""Launching runs through Hydra: one in this process, or the jobs of a multirun, which survive the death of a process.

What a job does is given as a function, ``train(cfg)``: this room does not know the stages of a run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime, JobStatus, run_job
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

import spo
from spo import signals
from spo.config.compose import VERSION_BASE, parse, register_resolvers
from spo.config.plan import Plan
from spo.errors import UserError, error_line, user_message
from spo.pages.sweep_table import print_sweep
from spo.processes import is_first_process, place, uses_gpu
from spo.records.files import write_text
from spo.records.sweep import SweepJob
from spo.resources import MAIN_CONFIG, conf_dir
from spo.runs import optuna_sweeper
from spo.runs.claim import read_failure, write_failure
from spo.runs.job_processes import is_stopping, job_processes, registered
from spo.runs.ledger import Ledger
from spo.runs.processes import SWEEP_VARIABLE, import_from_current_folder, sweep_dir
from spo.secrets import command_line, remember_secrets, scrub, scrub_logs
from spo.signals import Interrupted

Train = Callable[[DictConfig], Any]
MAX_ATTEMPTS = 3
"""Largest number of starts of a multirun whose launcher does not survive the death of a process."""


def launch_run(planned: Plan, train: Train) -> Any:
    """Run the only job of a plan in this process, with Hydra's logging, run directory and callbacks.

    It does what ``hydra.main`` does with a configuration that is composed already. If the run is a job of a sweep,
    its failure is entered in the ledger.

    Args:
        planned: Plan of a single run.
        train: Function of the configuration.

    Returns:
        What ``train`` returns.
    """
    cfg = planned.composed
    loader = ConfigLoaderImpl(create_config_search_path(str(conf_dir())))
    context = HydraContext(config_loader=loader, callbacks=Callbacks(cfg))
    JobRuntime.instance().set("name", str(cfg.hydra.job.name))
    context.callbacks.on_run_start(config=cfg, config_name=MAIN_CONFIG)
    done = run_job(_in_ledger(train), cfg, "hydra.run.dir", None, context)
    context.callbacks.on_run_end(config=cfg, config_name=MAIN_CONFIG, job_return=done)
    if done.status is JobStatus.FAILED:
        raise done._return_value  # Hydra's own property prints all overrides before it raises.
    return done.return_value


def launch_sweep(
    flags: Sequence[str], planned: Plan, train: Train, config_dir: str | None = None, command: str = "train"
) -> bool:
    """Run the jobs of a multirun, start the rest again if a process dies, and show what became of each.

    Args:
        flags: Flags of the command line for Hydra, such as ``-m``.
        planned: Plan of the multirun.
        train: Function of the configuration of a job.
        config_dir: Folder with further members of the groups.
        command: Name of the command that runs a single job.

    Returns:
        Whether every job is finished.

    Raises:
        UserError: The jobs could not be launched.
    """
    ledger, jobs = Ledger(planned.sweep_dir), planned.named_jobs()
    entries = ledger.begin(command_line(sys.argv), jobs, rerun=any(job.cfg.rerun for job in planned.jobs))
    for note in _notes(entries):
        print(f"note: {note}", file=sys.stderr)
    directory = str(planned.sweep_dir).replace("'", r"\'")
    arguments = [*flags, *below_swept_groups(planned.overrides), f"hydra.sweep.dir='{directory}'"]
    os.environ[SWEEP_VARIABLE] = str(planned.sweep_dir)
    died = False
    try:
        for attempts_left in reversed(range(MAX_ATTEMPTS)):
            try:
                with job_processes(planned.sweep_dir):
                    run_hydra(arguments, _SweepTask(train, config_dir, list(sys.argv), command))
                break
            except Exception as error:  # Jobs record their own errors, so this one comes from the launcher.
                signals.raise_received()  # A worker that a signal ended has not died by itself.
                entries = entries if planned.complete else ledger.entries()
                names = ledger.begun(entries)
                if not names and user_message(error) is None:
                    raise UserError(f"the jobs could not be launched: {error_line(error)}") from error
                if not names:
                    raise
                died = True
                next_step = "starting the rest again" if attempts_left else "giving up"
                print(
                    f"spo: a process died ({error_line(error)}) at work on {', '.join(names)}: {next_step}",
                    file=sys.stderr,
                )
    except Interrupted as interruption:
        raise Interrupted(interruption.signum, "the same command resumes the sweep") from None
    finally:
        del os.environ[SWEEP_VARIABLE]
        _scrub_sweep_file(planned.sweep_dir)
        entries = ledger.settle(entries if planned.complete else ledger.entries(), died)
        if planned.complete:
            print_sweep(entries, planned.sweep_dir)
    return all(entry.status == "finished" for entry in entries)


def below_swept_groups(overrides: Sequence[str]) -> list[str]:
    """Return overrides in which a value below a swept group is a choice of one.

    Hydra composes a configuration without the swept groups first. A key such as ``iteration.rounds`` does not exist in
    it, and only a value that is swept too waits for the jobs.

    Args:
        overrides: Overrides of a multirun.
    """
    parsed = [parse(text) for text in overrides]
    swept = {one.key_or_group for one in parsed if one.is_sweep_override()}
    return [
        f"{one.get_key_element()}=choice({one.get_value_element_as_str()})"
        if one.key_or_group.partition(".")[0] in swept and not one.is_sweep_override() and not one.is_delete()
        else text
        for text, one in zip(overrides, parsed, strict=True)
    ]


def run_hydra(arguments: Sequence[str], task: Train) -> None:
    """Give a command line to Hydra, which composes each run and calls ``task`` with it.

    Args:
        arguments: Flags and overrides.
        task: Function of the configuration; it must be picklable for launchers with processes of their own.
    """
    register_resolvers()
    optuna_sweeper.register()
    original, full_error = list(sys.argv), os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print errors and exit; the command line explains them itself.
    sys.argv = [original[0], *arguments]
    try:
        hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=MAIN_CONFIG)(task)()
    finally:
        sys.argv = original
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def count_devices(cfg: DictConfig) -> int:
    """Return how many processes a run wants, over all machines, with ``auto`` and lists of devices resolved."""
    nodes, devices = int(cfg.trainer.num_nodes), cfg.trainer.devices
    if isinstance(devices, int) and devices >= 0:
        return nodes * devices
    if str(devices).isdigit():
        return nodes * int(devices)
    if str(devices) not in ("auto", "-1"):
        return nodes * len(devices if not isinstance(devices, str) else devices.strip(",").split(","))
    import torch

    return nodes * (torch.cuda.device_count() if uses_gpu(cfg.trainer.accelerator) else 1)


def fit_to_processes(cfg: DictConfig) -> None:
    """Set ``trainer.devices`` and ``trainer.num_nodes`` to what torchrun, SLURM or ``spo train`` has started.

    A number of devices that the configuration gives stays, and is compared when the processes meet.

    Args:
        cfg: Configuration of the run, which changes.
    """
    own = place()
    if own.world_size > 1:
        cfg.trainer.num_nodes = own.nodes
        if str(cfg.trainer.devices) in ("auto", "-1"):
            cfg.trainer.devices = own.local_world_size


def _in_ledger(train: Train) -> Train:
    """Wrap a run so that its failure is entered in the ledger of the sweep it belongs to, if any."""

    def task(cfg: DictConfig) -> Any:
        try:
            return train(cfg)
        except Exception as error:
            if (directory := sweep_dir()) is not None and is_first_process():
                job = HydraConfig.get()
                name = Path(job.runtime.output_dir).name
                Ledger(directory).note(_overrides(job), name, "failed", error_line(error))
            raise

    return task


class _SweepTask:
    """One job of several: its failure is printed and entered in the ledger, and the others continue.

    Args:
        train: Function of the configuration of a job.
        config_dir: Folder with further members of the groups.
        argv: Command line as typed.
        command: Name of the command that runs a single job.
    """

    def __init__(self, train: Train, config_dir: str | None, argv: list[str], command: str) -> None:
        self.train, self.config_dir, self.argv, self.command = train, config_dir, argv, command
        self.process = os.getpid()

    def __call__(self, cfg: DictConfig) -> Any:
        sys.argv = self.argv
        import_from_current_folder()  # Launchers start processes of their own, which main() does not prepare.
        scrub_logs()
        remember_secrets(OmegaConf.to_container(cfg, resolve=False))
        job = HydraConfig.get()
        if is_stopping(Path(job.sweep.dir)):
            return None
        overrides, directory = _overrides(job), Path(job.runtime.output_dir).name
        ledger = Ledger(Path(job.sweep.dir))
        entry = ledger.entry(overrides)
        if entry is not None and (entry.same_as or (cfg.rerun and entry.status == "finished")):
            return None  # Another job is the same run, or this is a launcher's second attempt.
        if not is_first_process():
            with signals.handled():
                return self.train(cfg)
        _scrub_sweep_file(ledger.directory)
        ledger.note(overrides, directory, "running")
        try:
            result = None
            if _needs_own_process(cfg):
                _run_in_own_process(self.command, self.config_dir)
            elif os.getpid() == self.process:
                result = self.train(cfg)
            else:
                with signals.handled(), registered(ledger.directory, os.getpid()):
                    result = self.train(cfg)
        except Interrupted:
            ledger.note(overrides, directory, "unfinished")
            if signals.received() is None or is_stopping(ledger.directory):
                return None  # The signal was for the job alone, or its command waits for all jobs to stop.
            raise
        except Exception as error:
            words = user_message(error) or traceback.format_exc()
            print(f"spo: the job {' '.join(overrides)} failed: {words}", file=sys.stderr)
            ledger.note(overrides, directory, "failed", error_line(error))
            return None
        ledger.note(overrides, directory, "finished")
        return result


def _overrides(job: Any) -> list[str]:
    """Return the overrides of a job as typed: ``${oc.env:NAME}`` in one of them is not resolved."""
    overrides: Any = OmegaConf.to_container(job.overrides.task, resolve=False)
    return [str(override) for override in overrides]


def _scrub_sweep_file(sweep_dir: Path) -> None:
    """Remove secrets from the file into which Hydra writes the overrides of a multirun."""
    file = sweep_dir / "multirun.yaml"
    if file.is_file() and scrub(text := file.read_text(encoding="utf-8")) != text:
        write_text(file, text)


def _notes(entries: Sequence[SweepJob]) -> Iterator[str]:
    """Yield what a person would otherwise wonder about when fewer runs start than the command names."""
    different = {entry.directory for entry in entries}
    if len(different) < len(entries):
        words = f"{len(entries)} jobs are {len(different)} different runs"
        yield f"{words}: coefficients that a job does not read do not distinguish it"
    for status, consequence in (("finished", "skipped"), ("failed", "tried again")):
        if count := sum(entry.status == status and entry.same_as is None for entry in entries):
            yield f"{count} of {len(different)} runs {'is' if count == 1 else 'are'} {status} already: {consequence}"


def _needs_own_process(cfg: DictConfig) -> bool:
    """Return whether a job of a multirun must not run in the process that starts it.

    The command of one run starts the processes of several devices, if SLURM has not. joblib's workers serve many jobs:
    memory that one job leaves behind would stay, and its death would end the other jobs.
    """
    if place().world_size > 1:
        return False
    return count_devices(cfg) != 1 or str(HydraConfig.get().launcher._target_).endswith(".JoblibLauncher")


def _run_in_own_process(name: str, config_dir: str | None) -> None:
    job = HydraConfig.get()
    overrides, run_dir, sweep_dir = _overrides(job), Path(job.runtime.output_dir), Path(job.sweep.dir)
    command = [sys.executable, "-m", "spo", name, *(["--config-dir", config_dir] if config_dir else [])]
    directory = str(run_dir).replace("'", r"\'")
    signals.survive()
    with _safe_path():
        process = subprocess.Popen([*command, *overrides, "hydra.mode=RUN", f"hydra.run.dir='{directory}'"])
    try:
        with registered(sweep_dir, process.pid):
            if is_stopping(sweep_dir):  # The signal to all jobs came before this one was entered.
                process.terminate()
            status = process.wait()
    except BaseException:
        process.terminate()
        raise
    if status == 0:
        return
    if (failure := read_failure(run_dir)) is not None and failure.get("kind") == "interrupted" and status > 128:
        raise Interrupted(status - 128)
    if status < 0 and is_stopping(sweep_dir):  # The signal came before the job handled signals.
        raise Interrupted(-status)
    entry = Ledger(sweep_dir).entry(overrides)
    if entry is not None and entry.status == "failed":
        raise UserError(entry.error)
    words = f"its process was killed by signal {-status}" if status < 0 else f"its process ended with status {status}"
    write_failure(run_dir, words)
    raise UserError(words)


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keep the current folder off the path of Python processes that start meanwhile, unless this package lies there."""
    if "PYTHONSAFEPATH" in os.environ or Path(spo.__file__).parents[1] == Path.cwd():
        yield
        return
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]
