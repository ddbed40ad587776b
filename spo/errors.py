"""Errors whose message is for a person, as opposed to faults of the program."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """An error that the person who typed the command can correct. The message says what, where and how."""


class JudgeError(RuntimeError):
    """A judge that cannot do its work; the message says why and what to do."""


class DataError(ValueError):
    """Data that cannot be used as asked; the message says what is wrong, where, and what to do."""


# Module -> the extra of this package that installs it.
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
    """All problems of a configuration together.

    Args:
        problems: One sentence each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "a problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = (f"  - {problem}".replace("\n", "\n    ") for problem in self.problems)
        super().__init__("\n".join([f"the configuration has {count}:", *lines]))

    def __reduce__(self) -> tuple[type[ConfigProblems], tuple[list[str]]]:
        return type(self), (self.problems,)


def missing_package(module: str) -> str | None:
    """Return how to install a module that one of our extras brings, ``None`` for any other module."""
    name = module
    while name:
        if name in EXTRAS:
            return f"{name.rpartition('.')[2]} is not installed: pip install 'spo[{EXTRAS[name]}]'"
        name = name.rpartition(".")[0]
    return None


def user_message(error: Exception) -> str | None:
    """Return the message for a person, or ``None`` for a fault of the program, which needs its traceback."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    for one in chain:
        if isinstance(one, UserError | DataError | JudgeError):
            return str(one)
        if isinstance(one, ModuleNotFoundError) and (words := missing_package(str(one.name))):
            return words
    for one in chain:
        if type(one).__name__ == "MisconfigurationException":
            return str(one)
    cause = error.__cause__ or error
    from_hydra = type(cause).__module__.startswith(("hydra.", "omegaconf."))
    if type(error).__module__.startswith(("hydra.", "omegaconf.")):
        return str(error) if from_hydra or isinstance(cause, ValueError | TypeError | ImportError) else None
    return None


def error_line(error: Exception) -> str:
    """Return an error as one entry of a table: the message for a person, else type and message."""
    return user_message(error) or f"{type(error).__name__}: {error}".rstrip(": ")
