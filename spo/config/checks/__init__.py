"""Checks of a configuration before a model is loaded: every problem is found at once and explained in a sentence.

Quick checks come first. They need neither torch nor the code that a ``_target_`` names, so that a mistyped command is
answered at once. Only a configuration that passes them is checked against the code it names.
"""

from __future__ import annotations

from omegaconf import DictConfig

from spo.config.checks.callbacks import callback_problems
from spo.config.checks.combinations import combination_problems
from spo.config.checks.devices import device_problems
from spo.config.checks.files import file_problems, uncounted_parameters
from spo.config.checks.notes import warnings
from spo.config.checks.settings import (
    absent_groups,
    directive_problems,
    missing_and_unresolved,
    setting_problems,
    with_some_length,
    with_some_rate,
)
from spo.config.checks.targets import CheckedParts, target_problems
from spo.errors import ConfigProblems

__all__ = [
    "check_config",
    "code_problems",
    "missing_and_unresolved",
    "problems",
    "quick_problems",
    "warnings",
]


def check_config(cfg: DictConfig) -> None:
    """Raise :class:`ConfigProblems` with everything that is wrong with a configuration.

    Args:
        cfg: Composed configuration, with or without Hydra's own node.
    """
    if found := problems(cfg):
        raise ConfigProblems(found)


def problems(cfg: DictConfig) -> list[str]:
    """Return a sentence for each problem: the quick ones if there are any, else those found by importing code."""
    return quick_problems(cfg) or code_problems(cfg)


def quick_problems(cfg: DictConfig) -> list[str]:
    """Return missing and wrong values and files that do not exist, found without importing what runs."""
    cfg = with_some_length(cfg)
    steps = [missing_and_unresolved, absent_groups, directive_problems, setting_problems]
    steps += [device_problems, file_problems]
    return list(dict.fromkeys(problem for step in steps for problem in step(cfg)))


def code_problems(cfg: DictConfig) -> list[str]:
    """Return problems of targets, their parameters and their combination; this imports the code that they name.

    Parameters that cannot be counted are among them, so that a mistake in a combination is shown beside them.
    """
    uncounted = list(uncounted_parameters(cfg))
    cfg = with_some_rate(with_some_length(cfg))
    found = [*uncounted, *target_problems(cfg)]
    parts = CheckedParts(cfg, found)
    found += [*callback_problems(cfg, parts), *combination_problems(cfg, parts)]
    return list(dict.fromkeys(found))
