"""``spo iterate``: rounds of training, each from the policy of the round before, as ordinary runs with a ledger."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from spo.config.choices import pin_choices
from spo.config.coefficients import COEFFICIENTS
from spo.config.compose import compose
from spo.config.nodes import detached
from spo.errors import SET_RUN, UserError, placed_by
from spo.metrics.catalogue import CHOSEN, REFERENCE
from spo.metrics.rounds import FIRST
from spo.pages.iteration_page import render_iteration
from spo.pages.iteration_table import print_iteration
from spo.processes import first_decides, is_first_process
from spo.records import filenames
from spo.records.files import read_jsonl
from spo.records.iteration import Iteration, Round, is_iteration, read_iteration, write_iteration
from spo.rounds.alarms import round_alarms
from spo.runs.claim import set_aside
from spo.runs.processes import sweep_dir
from spo.stages.devices import join_processes
from spo.stages.earlier_rewards import earlier_coefficients
from spo.stages.train import train

log = logging.getLogger(__name__)
EVALUATION_SEED_STEP = 1_000_000
"""Difference between the evaluation seeds of neighboring rounds. It is larger than the seeds that people choose."""


def iterate(cfg: DictConfig) -> dict[str, float]:
    """Train the rounds of an iteration that are not finished.

    Round 0 makes and evaluates the first model. Each later round is a run that starts from the policy before it, with
    pairs of that policy's own completions. A round that is finished is skipped, and one that was interrupted resumes.

    Args:
        cfg: Configuration of ``spo iterate``: that of a run, with the group ``iteration``. ``paths.run`` is the
            directory of the iteration.

    Returns:
        Final metrics of the last round.

    Raises:
        UserError: A round cannot be trained, or the directory holds another iteration.
        PeerLostError: Another process has ended.
    """
    join_processes(cfg)
    pin_choices(cfg)
    directory = Path(cfg.paths.run)
    with placed_by(SET_RUN, directory):
        iteration = first_decides(partial(_begin, cfg, directory))
    metrics: dict[str, float] = {}
    for number in range(cfg.iteration.rounds + 1):
        one = _entry(cfg, iteration, number)
        started = perf_counter() - one.seconds

        def record(entry: Round = one, started: float = started, **changes: Any) -> None:
            vars(entry).update(changes, seconds=perf_counter() - started)
            if is_first_process():
                write_iteration(directory, iteration)

        is_new = one.status != "finished"
        if is_new:
            log.info("round %d of %d, in %s", number, cfg.iteration.rounds, directory / one.directory)
            iteration.settings = _settings(cfg)
            record(status="running")
        try:
            metrics = _train_round(cfg, directory, one)
        except Exception:
            if is_new:  # A finished round stays finished where other settings are rejected.
                record(status="failed")
            raise
        if is_new:
            record(status="finished")
            first_decides(partial(_show_round, cfg, directory, iteration, one))
    first_decides(partial(_show, cfg, directory, iteration))
    return metrics


def _show_round(cfg: DictConfig, directory: Path, iteration: Iteration, one: Round) -> None:
    """Print the alarms of a finished round, and write the page of the iteration so far."""
    _record_alarms(cfg, directory, iteration, [one])
    for words in one.alarms:
        print(f"note: {words}", file=sys.stderr)
    render_iteration(directory)


def _record_alarms(cfg: DictConfig, directory: Path, iteration: Iteration, rounds: Sequence[Round]) -> None:
    """Write the alarms of some rounds into the ledger, by the limits of the configuration."""
    for one in rounds:
        one.alarms = round_alarms(directory, iteration, one.number, **cfg.iteration.limits)
    write_iteration(directory, iteration)


def _show(cfg: DictConfig, directory: Path, iteration: Iteration) -> None:
    """Print the table of a finished iteration, and write its page; within a sweep, print one line.

    The limits of alarms may have changed since the rounds were trained, so the alarms are computed again.
    """
    iteration.settings["limits"] = _settings(cfg)["limits"]
    _record_alarms(cfg, directory, iteration, iteration.rounds)
    if sweep_dir() is None:
        print_iteration(directory)
    print(f"report {render_iteration(directory)}")


def _begin(cfg: DictConfig, directory: Path) -> Iteration:
    """Return the ledger of the iteration, a new one or that of the rounds so far.

    Raises:
        UserError: The directory holds an iteration of another kind.
    """
    if cfg.rerun:
        set_aside(directory)
    name = str((cfg.get("choices") or {}).get("iteration"))
    iteration = Iteration(name, cfg.iteration.reference, cfg.iteration.rounds, settings=_settings(cfg))
    if is_iteration(directory):
        before = read_iteration(directory)
        if (before.name, before.reference) != (iteration.name, iteration.reference):
            raise UserError(
                f"{directory} holds the iteration {before.name} with iteration.reference={before.reference}, and not "
                f"{name} with iteration.reference={iteration.reference}: choose another hydra.run.dir, or start again "
                "with rerun=true"
            )
        momentum = before.settings.get("momentum", cfg.iteration.momentum)
        if before.rounds[1:] and momentum != cfg.iteration.momentum:
            raise UserError(
                f"{directory} holds rounds with iteration.momentum={momentum}, not {cfg.iteration.momentum}: choose "
                "another hydra.run.dir, or rerun=true to start again"
            )
        # Fewer rounds than are finished train nothing and do not take any away.
        finished = [one.number for one in before.rounds if one.status == "finished"]
        iteration.planned = max([iteration.planned, *finished])
        iteration.rounds, iteration.settings = before.rounds, before.settings or iteration.settings
    else:
        write_iteration(directory, iteration)
    return iteration


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the values of the group ``iteration``, for people to read."""
    settings: dict[str, Any] = OmegaConf.to_container(cfg.iteration, resolve=True)  # type: ignore[assignment]
    return settings


def _entry(cfg: DictConfig, iteration: Iteration, number: int) -> Round:
    """Return the entry of a round in the ledger, a new one if the round has not begun."""
    if number == len(iteration.rounds):
        iteration.rounds.append(Round(number, filenames.round_directory(number), measured_directory(cfg, number)))
    return iteration.rounds[number]


def measured_directory(cfg: DictConfig, number: int) -> str:
    """Return the run directory whose policy stands for a round, relative to that of the iteration."""
    directory = filenames.round_directory(number)
    is_extrapolated = cfg.iteration.momentum != 0 and number > 0
    return f"{directory}/{filenames.EXTRAPOLATED}" if is_extrapolated else directory


def _train_round(cfg: DictConfig, directory: Path, one: Round) -> dict[str, float]:
    """Train a round and return its metrics; with momentum, those of the extrapolated policy."""
    run_cfg = first_round(cfg, directory) if one.number == 0 else round_config(cfg, directory, one.number)
    metrics = train(run_cfg)
    if one.measured == one.directory:
        return metrics
    from spo.stages.extrapolate import extrapolated_run

    folders = (directory / filenames.round_directory(number) for number in (one.number - 1, one.number))
    before, trained = (folder / filenames.POLICY for folder in folders)
    return extrapolated_run(run_cfg, before, trained, cfg.iteration.momentum, directory / one.measured)


# --- configurations ------------------------------------------------------------------------------------------------


def first_round(cfg: DictConfig, directory: Path) -> DictConfig:
    """Return the configuration of round 0: supervised fine-tuning, if any, and an evaluation of the result.

    Args:
        cfg: Configuration of the iteration.
        directory: Directory of the iteration.
    """
    own = _of_round(cfg, directory, 0)
    supervised = compose(["method=sft"])
    with open_dict(own):
        for group in ("method", "regularizer", "reference", *COEFFICIENTS):
            own[group] = OmegaConf.to_container(supervised[group], resolve=False)
        own.iteration = None
        own.extra_references = {}
        own.trainer.max_steps, own.trainer.max_epochs = 0, None
        if own.model.adapter_path is None:
            own.model.lora = None  # A fresh adapter does not change the model.
        own.evaluation.against = _against(cfg, ())
    return own


def round_config(cfg: DictConfig, directory: Path, number: int) -> DictConfig:
    """Return the configuration of a round of training.

    Args:
        cfg: Configuration of the iteration.
        directory: Directory of the iteration, in which the rounds before this one are finished.
        number: Number of the round, from 1.
    """
    own, settings = _of_round(cfg, directory, number), cfg.iteration
    policies = [policy_folder(cfg, directory, earlier) for earlier in range(number)]
    first, newest = str(policies[0]), str(policies[-1])
    reference_moves = settings.reference == "previous"
    with open_dict(own):
        own.sft.max_steps = 0
        own.model.initial = None
        own.model.adapter_path = None  # The policy of round 0 has it merged.
        own.model.path = newest if reference_moves else first
        own.model.start = None if reference_moves or number == 1 else newest
        for name in settings.first_references:
            own.extra_references[name] = first
        # The run of a round does not hold settings of the whole iteration, which later rounds may change.
        own.iteration = {
            "round": number,
            "first_step": sum(last_step(directory / filenames.round_directory(earlier)) for earlier in range(number)),
            "source": OmegaConf.to_container(settings.source, resolve=False),
        }
        own.iteration.source.update({"round": number, "policies": list(map(str, policies)), "first": first})
        if settings.rewards is not None:
            own.iteration.source.reward = settings.rewards[number - 1]
        finished = [directory / filenames.round_directory(earlier) for earlier in range(1, number)]
        own.iteration.source.earlier_coefficients = earlier_coefficients(settings.earlier_weights, finished)
        others = [] if number == 1 else [policies[0 if reference_moves else -1].parent]
        own.evaluation.against = _against(cfg, others)
        if reference_moves and number > 1:
            own.evaluation.further_kl[FIRST] = first
    return own


def policy_folder(cfg: DictConfig, directory: Path, number: int) -> Path:
    """Return the folder of the policy after a round, from which the next round starts."""
    return directory / measured_directory(cfg, number) / filenames.POLICY


def last_step(run_dir: Path) -> int:
    """Return the number of optimizer steps of a finished run.

    Args:
        run_dir: Run directory.
    """
    rows = read_jsonl(run_dir / filenames.HISTORY)
    return max((row["step"] for row in rows), default=0)


def _of_round(cfg: DictConfig, directory: Path, number: int) -> DictConfig:
    """Return the settings that all rounds share, in the directory of a round."""
    own = copy.deepcopy(cfg)
    if number > 0:
        # Rounds with the same random numbers would write similar samples, and the win rate of one against another would
        # not be that of independent samples. The seed still follows that of the run, as spo compare expects.
        seed = OmegaConf.to_container(cfg.evaluation, resolve=False)["seed"]  # type: ignore[call-overload,index]
        own.evaluation.seed = f"${{spo.add:{seed},{number * EVALUATION_SEED_STEP}}}"
    with open_dict(own.paths):
        # Identities replace folders of `paths` by their names, so rounds are the same if the directory was moved.
        own.paths.iteration = str(directory)
    own.paths.run = str(directory / filenames.round_directory(number))
    own.rerun = False  # The whole directory was moved aside.
    return own


def _against(cfg: DictConfig, others: Sequence[Path]) -> list[str]:
    """Return the opponents of a round: those of the configuration, the data's responses, and other rounds."""
    given = [str(name) for name in cfg.evaluation.against]
    if instantiate(detached(cfg.judge), _convert_="all") is None:
        return given
    return list(dict.fromkeys([*given, REFERENCE, CHOSEN, *map(str, others)]))
