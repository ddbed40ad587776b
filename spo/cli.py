"""The command line ``spo COMMAND ...``: help, dispatch, and errors in words."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from spo.commands import RUN, UsageError
from spo.help import COMMANDS, help_of
from spo.processes import end_process
from spo.runs.processes import import_from_current_folder
from spo.secrets import scrub_output
from spo.wording import clean

FIRST_SPEAKS_SECONDS = 10
"""Time that the first process of torchrun or ``srun`` has to report an error before another one ends with it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after ``spo``; ``None`` for those of the process.

    Returns:
        Exit status: 0, 1 for an error in the run or its settings, 2 for a wrong command line, 128 plus the number of a
        signal that interrupted it.
    """
    end_scrubbing = scrub_output()
    try:
        status = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        if argv is None:
            end_process(status)
        return status
    except BrokenPipeError:  # The reader stopped reading, as in `spo --help | head`.
        _drop_output()
        return 0
    except OSError as error:  # The output goes to a file on a full disk; results are in the files of the run.
        _drop_output()
        return _fail(f"the output of this command cannot be written: {error.strerror}", 1)
    finally:
        if argv is not None:  # Python prints the traceback of a fault after the end of the process's own command.
            end_scrubbing()


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(words: list[str]) -> int:
    name, arguments = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(help_of(None, arguments))
        return 0
    if name in ("--version", "-V"):
        from spo import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f": the commands are {', '.join(COMMANDS)}"
        return _fail(f"there is no command {name!r}{hint}", 2)
    if "--help" in arguments or "-h" in arguments:
        print(help_of(name, arguments))
        return 0
    from spo.processes import PeerLostError, place, world_size
    from spo.signals import Interrupted, handled

    own = place()
    if not own.is_first:
        _stay_silent()
    if own.launcher == "spo":
        from spo.runs.supervise import end_with_supervisor

        end_with_supervisor()

    # Python would print a traceback for each line of a log file on a full disk.
    logging.raiseExceptions = os.environ.get("SPO_DEBUG") == "1"
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # It warns if the home folder cannot be written.
    # Other commands read directories that may be somebody else's.
    if name in ("train", "iterate", "inspect", "methods", "verify"):
        import_from_current_folder()
    try:
        with handled():
            return RUN[name](arguments)
    except UsageError as error:
        return _fail(str(error), 2) if own.is_first else _after_first(2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Interrupted as interruption:
        return _fail(str(interruption), interruption.status) if own.is_first else 0
    except PeerLostError:
        # The process that failed has said why. One that was killed has not, and only spo train watches for that.
        if own.is_first and own.launcher != "spo":
            return _fail("another process of the run has ended: its messages say why, if it was not killed", 1)
        return 1 if own.is_first else _after_first(1)
    except Exception as error:
        if os.environ.get("SPO_DEBUG") == "1":
            raise
        from spo.errors import user_message

        words_of_error = user_message(error)
        if words_of_error is None:
            raise
        if own.is_first:
            return _fail(words_of_error, 1)
        # Before the processes have met, all of them fail alike.
        return _fail(f"process {own.rank}: {words_of_error}", 1) if world_size() > 1 else _after_first(1)


def _after_first(status: int) -> int:
    """Return an exit status once the first process has had time to say what failed.

    torchrun and srun end all processes as soon as one of them fails, and they end this one when the first does.
    """
    from spo.processes import place

    if place().launcher in ("torchrun", "slurm"):
        time.sleep(FIRST_SPEAKS_SECONDS)
    return status


def _stay_silent() -> None:
    """Drop what a process that is not the first would print, except for the error that ends it."""
    import warnings

    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _fail(message: str, status: int) -> int:
    with suppress(OSError):
        sys.stdout.flush()
    print(f"spo: {clean(message)}", file=sys.stderr)  # A received file may hold commands for the terminal.
    return status
