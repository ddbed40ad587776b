"""Signals that interrupt a run: at once, or after the optimizer step at hand.

A command handles them within :func:`handled`. Outside of training the handler raises :class:`Interrupted`. While
training defers signals (:func:`defer`), the handler notes them, and training stops itself where it can be resumed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

INTERRUPTING = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
"""Names of the signals that interrupt a run. Windows does not have all of them."""
LAUNCHERS = ("SIGUSR2",)
"""Names of further signals that a launcher of jobs may handle, as submitit does before a job's time is up."""
REPEAT_SECONDS = 0.5
"""Time within which a repeated signal counts as one: a terminal signals all processes, and they signal each other."""

RAISE_AGAIN_SECONDS = 0.05
"""Time after which a signal is sent again whose interruption Python discarded."""

Handler = Callable[[int, FrameType | None], Any]


class Interrupted(BaseException):
    """The end of a run by a signal. It is not an :class:`Exception`, so that nothing takes it for a failed job.

    Args:
        signum: Number of the signal.
        consequence: What a person should know about the state of the run and how to resume it.
    """

    def __init__(self, signum: int, consequence: str = "") -> None:
        super().__init__(signum, consequence)
        self.signum, self.consequence = int(signum), consequence

    @property
    def status(self) -> int:
        """Return the exit status of a process that a signal ends, as shells report it."""
        return 128 + self.signum

    def with_remedy(self, remedy: str) -> Interrupted:
        """Return the same interruption, with a clause on how to resume the run."""
        return Interrupted(self.signum, f"{self.consequence}; {remedy}" if self.consequence else remedy)

    def __str__(self) -> str:
        """Return one sentence."""
        words = f"interrupted by {signal.Signals(self.signum).name}"
        return f"{words}: {self.consequence}" if self.consequence else words


class _State:
    """Signals of this process.

    Attributes:
        received: Number of the signal that interrupts the run, ``None`` until there is one.
        deferring: Whether training stops itself.
        earlier: Handlers that a launcher had set before, by signal.
        terminals: File descriptors of output to a terminal.
        relay: Function that passes a signal on to processes that this one waits for, and returns whether there are any.
    """

    def __init__(self) -> None:
        self.process: int | None = None  # None while no signal is handled
        self.received: int | None = None
        self.deferring = False
        self.earlier: dict[int, Handler] = {}
        self.relay: Callable[[int], bool] | None = None
        self.terminals: list[int] = []
        self._at = 0.0

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # A forked worker, such as one that loads data, inherits the handler; its parent decides.
        if self.received is not None:
            if signum != signal.SIGINT or time.monotonic() - self._at < REPEAT_SECONDS:
                return
            if self.relay is not None:
                self.relay(signum)
            raise Interrupted(signum, "ended at once")
        if signum in self.earlier and not self.deferring:
            self.earlier[signum](signum, frame)
            return
        self.received, self._at = signum, time.monotonic()
        if signum == getattr(signal, "SIGHUP", None):
            self._leave_terminal()
        if self.relay is not None and self.relay(signum):
            return
        if not self.deferring:
            raise Interrupted(signum)
        if signum == signal.SIGINT and sys.stderr.isatty():
            print("spo: stopping after this step; press again to end at once", file=sys.stderr)

    def _leave_terminal(self) -> None:
        """Discard further output to a terminal that is gone, where every write would be an error."""
        for descriptor in self.terminals:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)


_state = _State()


@contextmanager
def handled() -> Iterator[None]:
    """Handle the signals that interrupt a run, in the main thread; within another such block, do nothing.

    A signal that is ignored stays ignored, as after ``nohup``. A handler that a launcher of jobs has set decides what
    happens, once training has written a checkpoint.
    """
    if _state.process == os.getpid() or threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.__init__()  # type: ignore[misc]
    _state.process = os.getpid()
    _state.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    before: dict[int, Any] = {}
    for name in (*INTERRUPTING, *LAUNCHERS):
        signum = getattr(signal, name, None)
        if signum is None:
            continue
        found = signal.getsignal(signum)
        of_launcher = callable(found) and found is not signal.default_int_handler
        if found in (signal.SIG_IGN, None) or (name in LAUNCHERS and not of_launcher):
            continue
        if of_launcher:
            _state.earlier[signum] = found  # type: ignore[assignment]
        before[signum] = found
        signal.signal(signum, _state.handle)
    hook = sys.unraisablehook
    sys.unraisablehook = partial(_raise_again, hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for signum, found in before.items():
            signal.signal(signum, found)
        _state.process = None


def _raise_again(hook: Callable[[Any], Any], unraisable: Any) -> None:
    """Send a signal again that came within a finalizer, where Python discards what is raised; pass on the rest.

    Args:
        hook: Hook of Python for other exceptions that are discarded.
        unraisable: Discarded exception, see :func:`sys.unraisablehook`.
    """
    if not isinstance(unraisable.exc_value, Interrupted) or os.getpid() != _state.process:
        hook(unraisable)
        return
    if not unraisable.exc_value.consequence:  # A second signal stays the second one.
        _state.received = None
    # The finalizer has not returned yet, and an exception that is raised here is discarded as well.
    timer = threading.Timer(RAISE_AGAIN_SECONDS, os.kill, (os.getpid(), unraisable.exc_value.signum))
    timer.daemon = True
    timer.start()


@contextmanager
def relayed(relay: Callable[[int], bool]) -> Iterator[None]:
    """Pass signals on to other processes while a block waits for them; at its end, raise what came.

    Args:
        relay: Function that sends a signal to those processes, and returns whether there are any.

    Raises:
        Interrupted: A signal came.
    """
    _state.relay = relay
    try:
        yield
    finally:
        _state.relay = None
    raise_received()


def raise_received() -> None:
    """Raise :class:`Interrupted` if a signal has come."""
    if _state.received is not None:
        raise Interrupted(_state.received)


def survive() -> None:
    """Ignore the signals for good in a worker that runs jobs in processes of their own, which handle them."""
    if _state.process != os.getpid() and threading.current_thread() is threading.main_thread():
        for name in INTERRUPTING:
            if (signum := getattr(signal, name, None)) is not None:
                # Not SIG_IGN, which the processes that it starts would inherit.
                signal.signal(signum, lambda *_: None)


def received() -> int | None:
    """Return the signal that interrupts the run, ``None`` if there is none."""
    return _state.received


def defer(deferring: bool) -> None:
    """Let training stop itself from here on, or let signals interrupt at once again."""
    _state.deferring = deferring


def hand_back(signum: int) -> bool:
    """Give a signal to the handler that a launcher had set for it; return whether there is one.

    The handler may end the process. If it returns, the run continues.
    """
    if signum not in _state.earlier:
        return False
    _state.received = None
    _state.earlier[signum](signum, None)
    return True


def reinstall() -> None:
    """Handle the signals here again after a library has set handlers of its own."""
    if _state.process != os.getpid() or threading.current_thread() is not threading.main_thread():
        return
    for name in INTERRUPTING:
        signum = getattr(signal, name, None)
        if signum is not None and signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _state.handle)
