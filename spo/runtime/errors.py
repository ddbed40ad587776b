"""Errors that are a message to a person, not a fault of the program."""

from __future__ import annotations

from collections.abc import Sequence

from spo.errors import UserError

# The module that is missing, and the extra of the package that brings it.
EXTRAS = {
    "peft": "peft",
    "hydra_plugins.hydra_joblib_launcher": "joblib",
    "joblib": "joblib",
    "hydra_plugins.hydra_submitit_launcher": "slurm",
    "submitit": "slurm",
    "optuna": "optuna",
    "openai": "judge",
    "wandb_workspaces": "dashboards",
    "deepspeed": "deepspeed",
    "tensorboard": "tensorboard",
    "trl": "trl",
}


class ConfigProblems(UserError):
    """Everything that is wrong with a configuration, together.

    Args:
        problems: one sentence each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "a problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = (f"  - {problem}".replace("\n", "\n    ") for problem in self.problems)
        super().__init__("\n".join([f"the configuration has {count}:", *lines]))

    def __reduce__(self) -> tuple[type[ConfigProblems], tuple[list[str]]]:
        return type(self), (self.problems,)


def missing_package(module: str) -> str | None:
    """``pip install 'spo[EXTRA]'`` for a module that one of the package's extras brings, else ``None``."""
    name = module
    while name:
        if name in EXTRAS:
            return f"{name.rpartition('.')[2]} is not installed: pip install 'spo[{EXTRAS[name]}]'"
        name = name.rpartition(".")[0]
    return None
