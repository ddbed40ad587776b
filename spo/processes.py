"""The processes of a run: how many there are, which one this is, and how they share decisions and work.

A run on several devices has one process per device. ``spo train``, torchrun or SLURM starts them; each finds its place
in the environment (:func:`place`). They meet in :func:`join`. Before that, and in a run of one process, each function
here does what one process alone would do.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

from spo import slurm

T = TypeVar("T")
S = TypeVar("S")
MAX_WAIT = timedelta(days=7)
"""Longest time that a process waits for another one, which may ask a judge or wait for another run.

A connection to a process that has ended is lost at once, so this is no limit for finding that.
"""
LAUNCHED_BY = "SPO_LAUNCHED"
"""Environment variable that ``spo train`` sets to 1 for the processes that it starts."""


class PeerLostError(RuntimeError):
    """Another process of the run ended while this one waited for it. Its own message says why."""


@dataclass(frozen=True)
class Place:
    """Place of this process in its run.

    Attributes:
        rank: Number of the process, from 0. The process with number 0 writes the files of the run.
        world_size: Number of processes.
        local_rank: Number of the process on its node.
        local_world_size: Number of processes on its node.
        launcher: Program that started the processes; ``"none"`` for a process by itself.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: Literal["none", "spo", "torchrun", "slurm"] = "none"

    @property
    def nodes(self) -> int:
        """Return the number of nodes."""
        return self.world_size // self.local_world_size

    @property
    def is_first(self) -> bool:
        """Return whether the process is the one that writes the files of the run."""
        return self.rank == 0


def place() -> Place:
    """Return the place of this process, from the environment variables of the program that started it.

    These are the variables of torchrun, which ``spo train`` sets too, or those of a step of SLURM (``srun``) with
    several tasks. A batch script of SLURM by itself is one process.
    """
    variables = os.environ
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= variables.keys():
        own = variables.get(LAUNCHED_BY) == "1"
        world_size = int(variables["WORLD_SIZE"])
        return Place(
            int(variables["RANK"]),
            world_size,
            int(variables["LOCAL_RANK"]),
            int(variables.get("LOCAL_WORLD_SIZE", world_size)),
            "spo" if own else "torchrun",
        )
    if int(variables.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in variables:
        world_size = int(variables["SLURM_STEP_NUM_TASKS"])
        nodes = int(variables.get("SLURM_STEP_NUM_NODES") or 1)
        return Place(
            int(variables["SLURM_PROCID"]), world_size, int(variables["SLURM_LOCALID"]), world_size // nodes, "slurm"
        )
    return Place()


def is_first_process() -> bool:
    """Return whether this process is the one of its run that writes files."""
    return place().is_first


def uses_gpu(accelerator: str) -> bool:
    """Return whether a run with this ``trainer.accelerator`` computes on the GPUs of this machine.

    Args:
        accelerator: Value of the key.
    """
    import torch

    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


# --- meeting ---------------------------------------------------------------------------------------------------------


def join(device_type: str, device_index: int | None = None) -> None:
    """Let the processes of the run meet. All of them call this, once, before they share anything.

    Objects travel over gloo, tensors on a GPU over NCCL.

    Args:
        device_type: Type of the devices, ``"cpu"`` or ``"cuda"``.
        device_index: Number of the device of this process, ``None`` for its number on the node.
    """
    own = place()
    if own.world_size == 1 or _joined():
        return
    import torch

    for name, value in _torch_variables(own).items():
        os.environ.setdefault(name, value)
    if device_type == "cuda":
        torch.cuda.set_device(own.local_rank if device_index is None else device_index)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=own.rank, world_size=own.world_size, timeout=MAX_WAIT)


def end_process(status: int) -> None:
    """End a process that has joined others, once its work is done; do nothing in a process by itself.

    Threads of the group now and then abort a process while Python and its libraries are torn down, which would turn a
    finished run into a failed one. So the functions that are registered for the end run, and nothing after them.

    Args:
        status: Exit status.
    """
    if _joined():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def meeting_point() -> tuple[str, int]:
    """Return the address and the port at which the processes of :func:`join` meet."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _torch_variables(own: Place) -> dict[str, str]:
    """Return the environment variables with which PyTorch finds the other processes under SLURM."""
    if own.launcher != "slurm":
        return {}
    address, port = slurm.meeting_point()
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(own.rank),
        "WORLD_SIZE": str(own.world_size),
        "LOCAL_RANK": str(own.local_rank),
        "LOCAL_WORLD_SIZE": str(own.local_world_size),
    }


def _joined() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Return the number of this process among those that have met, 0 before they meet."""
    if not _joined():
        return 0
    import torch

    return torch.distributed.get_rank()


def world_size() -> int:
    """Return the number of processes that have met, 1 before they meet."""
    if not _joined():
        return 1
    import torch

    return torch.distributed.get_world_size()


# --- sharing ---------------------------------------------------------------------------------------------------------


def share(value: T) -> T:
    """Return the value that the first process gives. All processes call this; those of the others are ignored.

    Args:
        value: Any value that can be pickled.

    Raises:
        PeerLostError: Another process has ended.
    """
    if world_size() == 1:
        return value
    import torch

    box = [value if rank() == 0 else None]
    _together(lambda: torch.distributed.broadcast_object_list(box, src=0))
    return box[0]  # type: ignore[return-value]


def first_decides(decide: Callable[[], T]) -> T:
    """Call a function on the first process alone, and return its result on all of them.

    Decisions that follow from files are made this way, because processes would read them at different times.

    Args:
        decide: Function of the first process.

    Raises:
        PeerLostError: The function failed, which the first process reports itself, or a process has ended.
    """
    if world_size() == 1:
        return decide()
    return share(decide() if rank() == 0 else None)  # type: ignore[return-value]


def deal(items: Sequence[T]) -> list[T]:
    """Return the items of this process: every ``world_size``-th one, from its own number on."""
    return list(items[rank() :: world_size()])


def gather(own: Sequence[S]) -> list[S]:
    """Return the results of all processes in the order of the items that :func:`deal` gave them.

    Args:
        own: Result for each item of this process, in order.

    Raises:
        PeerLostError: Another process has ended.
    """
    if world_size() == 1:
        return list(own)
    parts = gather_objects(list(own))
    count = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def gather_objects(own: T) -> list[T]:
    """Return what each process gives, by rank. All processes call this.

    Args:
        own: Any value that can be pickled.

    Raises:
        PeerLostError: Another process has ended.
    """
    if world_size() == 1:
        return [own]
    import torch

    parts: list[Any] = [None] * world_size()
    _together(lambda: torch.distributed.all_gather_object(parts, own))
    return parts


@contextmanager
def peer_loss_in_words() -> Iterator[None]:
    """Turn the errors of a connection to a process that has ended into :class:`PeerLostError`.

    A process that fails by itself is left alone, and so is a run of one process.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PeerLostError) or world_size() == 1 or not _is_of_connection(error):
            raise
        raise PeerLostError("another process of the run has ended") from error


def _is_of_connection(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _together(collective: Callable[[], Any]) -> None:
    """Run a collective operation, whose failure means that another process has ended."""
    with peer_loss_in_words():
        collective()
