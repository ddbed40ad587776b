"""The command line of ``spo iterate``: the short form of its rounds, and the directory of an iteration."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from spo.errors import UserError

_DIRECTORY = "${paths.outputs}/iterations/${spo.sweep_name:${hydra.overrides.task}}"
_CHOOSE = "iteration is not set: choose one, such as iteration=dpo (spo iterate --help lists them)"
_MAY_CHOOSE = frozenset(["iteration", "experiment", "hparams_search", "--config-name", "-cn"])


def iteration_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of ``spo iterate``, with ``iteration.rounds`` for ``rounds`` and with default directories.

    Args:
        arguments: Arguments as typed. A directory in them takes precedence.

    Raises:
        UserError: A number of rounds is given, but no argument chooses an iteration.
    """
    names = {word.lstrip("+").partition("=")[0] for word in arguments}
    if "rounds" in names and not names & _MAY_CHOOSE:
        raise UserError(_CHOOSE)
    written = [f"iteration.{word}" if word.startswith("rounds=") else word for word in arguments]
    directories = (f"hydra.{mode}.dir='{_DIRECTORY}'" for mode in ("run", "sweep"))
    given = {word.partition("=")[0] for word in written}
    return [*(word for word in directories if word.partition("=")[0] not in given), *written]


def check_command_fits(command: str, jobs: Sequence[DictConfig]) -> None:
    """Check that the configurations of a command are of the kind that it runs.

    Args:
        command: ``train`` or ``iterate``.
        jobs: Configuration of each job.

    Raises:
        UserError: An iteration is given to ``spo train``, or ``spo iterate`` does not have one, or sweeps over rounds.
    """
    if len({OmegaConf.select(cfg, "iteration.rounds") for cfg in jobs}) > 1:
        # Jobs that differ in this key alone would share a directory.
        raise UserError(
            "iteration.rounds: a sweep takes a single value, such as the largest, which includes the others"
        )
    for cfg in jobs:
        # The configuration of a single round does not have the number of rounds.
        has_rounds = OmegaConf.select(cfg, "iteration.rounds") is not None
        if command == "train" and has_rounds:
            raise UserError("iteration is set, but spo train trains a single run: use spo iterate, or remove iteration")
        if command == "iterate" and not has_rounds:
            raise UserError(_CHOOSE)
