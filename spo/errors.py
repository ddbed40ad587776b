"""Errors whose message is for a person, as opposed to faults of the program."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


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


MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to allocate",
    "bad_alloc",
    "STATUS_ALLOC_FAILED",
    "insufficient shared memory",
)
"""Phrases of PyTorch, CUDA, MPS, NumPy and the C++ library in errors about memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the host does not have enough memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # By name, since torch is not imported here. DefaultCPUAllocator and DataLoader raise a plain RuntimeError.
    words = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(phrase.lower() in words for phrase in MEMORY_WORDS)
    )


@contextmanager
def memory_for(activity: str, *keys: str, otherwise: str = "") -> Iterator[None]:
    """Turn an error about memory into a sentence with the keys that decide how much is needed.

    Args:
        activity: Work of the block, such as ``"a training step"``.
        keys: Configuration keys to lower.
        otherwise: Further remedy, if there is one.

    Raises:
        UserError: There was not enough memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        words = f"out of memory in {activity}: lower {', '.join(keys[:-1])}{' or ' if keys[1:] else ''}{keys[-1]}"
        raise UserError(f"{words}, or {otherwise}" if otherwise else words) from error


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
    if any(map(is_out_of_memory, chain)):
        return (
            "out of memory: choose a smaller model.path, or lower data.micro_batch_size, data.eval_batch_size, "
            "evaluation.batch_size, data.max_length or data.num_workers"
        )
    cause = error.__cause__ or error
    from_hydra = type(cause).__module__.startswith(("hydra.", "omegaconf."))
    if type(error).__module__.startswith(("hydra.", "omegaconf.")):
        return str(error) if from_hydra or isinstance(cause, ValueError | TypeError | ImportError) else None
    return None


def error_line(error: Exception) -> str:
    """Return an error as one entry of a table: the message for a person, else type and message."""
    return user_message(error) or f"{type(error).__name__}: {error}".rstrip(": ")
