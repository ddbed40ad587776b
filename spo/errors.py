"""Errors whose message is for a person, as opposed to faults of the program."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


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


# Errors of the file system: the reason, and the remedy, in which {elsewhere} says how to place the file elsewhere.
_SPACE = "free some space there, or {elsewhere}; the same command then continues"
_ACCESS = "make the folder writable, or {elsewhere}"
_OBSTACLE = "move it away, or {elsewhere}"
DISK_ERRORS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EFBIG: ("the system does not allow a file of this size", _SPACE),
    errno.EIO: ("the disk cannot be read or written", "check the disk, or {elsewhere}"),
    errno.ESTALE: ("the network file system has lost the file", "check the file system, or {elsewhere}"),
    errno.EROFS: ("the file system is read-only", "{elsewhere}"),
    errno.EACCES: ("permission is denied", _ACCESS),
    errno.EPERM: ("the system does not permit this", _ACCESS),
    errno.ENOTDIR: ("a part of this path is not a folder", _OBSTACLE),
    errno.EISDIR: ("there is a folder in place of a file", _OBSTACLE),
    errno.EEXIST: ("there is a file in place of a folder", _OBSTACLE),
    errno.ENOTEMPTY: ("there is a folder that is not empty", _OBSTACLE),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "{elsewhere}"),
    errno.ELOOP: ("a link leads to itself", _OBSTACLE),
    errno.ENOENT: ("there is no such file or folder", "check the path, or {elsewhere}"),
    errno.EBUSY: ("the file is in use", "wait for the other program, or {elsewhere}"),
    errno.EMFILE: ("this process has too many open files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("the system has too many open files", "close other programs"),
    errno.ENOLCK: ("the file system cannot lock files", "{elsewhere}"),
}
SET_RUN = "set hydra.run.dir (or paths.outputs)"
SET_SWEEP = "set hydra.sweep.dir (or paths.outputs)"
SET_CACHE = "set paths.cache (or SPO_CACHE_DIR)"
COPY_RUN = "copy the run directory to another place"
_SET_ANY = f"{SET_RUN} for a run, {SET_CACHE} for the cache"
# Libraries that write files report the system's error in their own types, with its number or its text.
_SYSTEM_ERROR = re.compile(
    r"\(os error (?P<number>\d+)\)|\[Errno (?P<errno>\d+)\]|(?P<full>No space left on device)|(?P<quota>quota exceeded)"
    r"|(?P<read_only>Read-only file system)"
)


def disk_error(error: BaseException) -> tuple[int, str | None] | None:
    """Return the number of an error of the file system, and the path that it names; ``None`` for other errors."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        path = error.filename2 or error.filename
        return error.errno, None if path is None or isinstance(path, int) else str(path)
    of_library = isinstance(error, RuntimeError) or type(error).__module__.startswith("safetensors")
    found = _SYSTEM_ERROR.search(str(error)) if of_library else None
    if found is None:
        return None
    named = {"full": errno.ENOSPC, "quota": errno.EDQUOT, "read_only": errno.EROFS}
    number = int(found["number"] or found["errno"] or named[str(found.lastgroup)])
    return (number, None) if number in DISK_ERRORS else None


def disk_sentence(number: int, path: str | Path, elsewhere: str) -> str:
    """Return an error of the file system as one sentence.

    Args:
        number: Number of the error, one of :data:`DISK_ERRORS`.
        path: File or folder that cannot be used.
        elsewhere: Advice that names the configuration keys which place it elsewhere.
    """
    reason, remedy = DISK_ERRORS[number]
    return f"{path}: {reason}; {remedy.format(elsewhere=elsewhere)}"


@contextmanager
def placed_by(elsewhere: str, place: Path) -> Iterator[None]:
    """Turn an error of the file system into a sentence with the path and with advice.

    Args:
        elsewhere: Advice that names what sets ``place``, such as :data:`SET_RUN`.
        place: File or folder that the block writes. It stands for a path that the error does not name.

    Raises:
        UserError: The block could not read or write a file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for one in _chain(error):
            if isinstance(one, UserError | DataError | JudgeError):
                break
            if (found := disk_error(one)) is not None:
                number, path = found
                # The error may be about a parent of the place, which its key moves as well.
                named, ours = Path(path or place).absolute(), place.absolute()
                here = named.is_relative_to(ours) or ours.is_relative_to(named)
                raise UserError(disk_sentence(number, path or place, elsewhere if here else _SET_ANY)) from error
        raise


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error, its cause, the cause of that, and so on."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return chain


def user_message(error: Exception) -> str | None:
    """Return the message for a person, or ``None`` for a fault of the program, which needs its traceback."""
    chain = _chain(error)
    for one in chain:
        if isinstance(one, UserError | DataError | JudgeError):
            return str(one)
        if isinstance(one, ModuleNotFoundError) and (words := missing_package(str(one.name))):
            return words
    for one in chain:
        if type(one).__name__ == "MisconfigurationException":
            return str(one)
    for one in chain:
        # A file that is missing without a path is a fault of the program.
        if (found := disk_error(one)) is not None and (found[1] is not None or found[0] != errno.ENOENT):
            return disk_sentence(found[0], found[1] or "a file of this command", _SET_ANY)
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
