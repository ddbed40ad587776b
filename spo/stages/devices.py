"""The devices of a run: where its processes meet, and what a Trainer needs to know of them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.fabric.utilities.device_parser import _parse_gpu_ids
from lightning.pytorch import Trainer
from omegaconf import DictConfig, ListConfig, OmegaConf

from spo import processes
from spo.data import PreparedPairs
from spo.errors import UserError
from spo.processes import place, uses_gpu
from spo.runs.launch import count_devices, fit_to_processes


class LaunchedEnvironment(ClusterEnvironment):
    """The processes of a run, for a Trainer, whichever program has started them."""

    @property
    def creates_processes_externally(self) -> bool:
        """Return true: the processes run already."""
        return True

    @property
    def main_address(self) -> str:
        """Return the address at which the processes have met."""
        return processes.meeting_point()[0]

    @property
    def main_port(self) -> int:
        """Return the port at which the processes have met."""
        return processes.meeting_point()[1]

    @staticmethod
    def detect() -> bool:
        """Return whether this process is one of several."""
        return place().world_size > 1

    def world_size(self) -> int:
        """Return the number of processes."""
        return place().world_size

    def set_world_size(self, size: int) -> None:
        """Do nothing, because the number of processes is fixed."""

    def global_rank(self) -> int:
        """Return the number of this process."""
        return place().rank

    def set_global_rank(self, rank: int) -> None:
        """Do nothing, because the number of this process is fixed."""

    def local_rank(self) -> int:
        """Return the number of this process on its node."""
        return place().local_rank

    def node_rank(self) -> int:
        """Return the number of the node."""
        return place().rank // place().local_world_size


def join_processes(cfg: DictConfig) -> None:
    """Let the processes of a run meet.

    Args:
        cfg: Configuration of the run.

    Raises:
        UserError: The run asks for another number of processes than there are.
    """
    fit_to_processes(cfg)
    own, wanted = place(), count_devices(cfg)
    if own.world_size != wanted:
        started = f"{own.launcher} has started {own.world_size}" if own.world_size > 1 else "this process is by itself"
        remedy = (
            "use the command spo train, or start the program by torchrun"
            if own.world_size == 1
            else f"set trainer.devices={own.local_world_size} and trainer.num_nodes={own.nodes}"
        )
        raise UserError(f"trainer.devices: the run wants {wanted} processes, and {started}: {remedy}")
    _check_device(cfg)
    device = process_device(cfg)
    processes.join(device.type, device.index)


def _check_device(cfg: DictConfig) -> None:
    """Refuse a device that this machine does not have, or on which the strategy does not run."""
    own, accelerator = place(), cfg.trainer.accelerator
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator in ("gpu", "cuda") and gpus == 0:
        raise UserError(f"trainer.accelerator={accelerator}: this machine does not have a GPU: set it to cpu")
    on_gpu = gpus > 0 and uses_gpu(accelerator)
    if on_gpu and own.local_world_size > gpus:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices}: {own.local_world_size} processes run on this machine, and each "
            f"sees {gpus} GPU{'s'[: gpus != 1]}: start one process per GPU, and ask SLURM for --gpus-per-node"
        )
    target = str(OmegaConf.select(cfg, "strategy.plugin._target_"))
    if target.endswith(".DeepSpeedStrategy") and not on_gpu:
        raise UserError("strategy=deepspeed runs on GPUs alone: choose strategy=ddp or strategy=fsdp on a CPU")


def process_device(cfg: DictConfig) -> torch.device:
    """Return the device of this process.

    Args:
        cfg: Configuration of the run.
    """
    if not uses_gpu(cfg.trainer.accelerator):
        return torch.device("cpu")
    devices = _devices(cfg)
    ids = _parse_gpu_ids(-1 if str(devices) in ("auto", "-1") else devices, include_cuda=True) or [0]
    return torch.device("cuda", ids[place().local_rank])


def _devices(cfg: DictConfig) -> Any:
    """Return ``trainer.devices``, with a list as Lightning takes it."""
    devices = cfg.trainer.devices
    return list(devices) if isinstance(devices, ListConfig) else devices


def refuse_few_pairs(pairs: PreparedPairs, count: int) -> None:
    """Refuse splits with fewer pairs than devices, before a model is loaded.

    Args:
        pairs: Data set, in splits.
        count: Number of devices.

    Raises:
        UserError: A split that training reads has fewer pairs than there are devices.
    """
    more = {"train": "use more data, or raise data.num_pairs", "selection": "raise data.splits.selection"}
    for split, remedy in more.items():
        size = len(getattr(pairs, split))
        if 0 < size < count:
            raise UserError(
                f"trainer.devices: the {split} split has {size} pair{'s'[: size != 1]} for {count} devices, and each "
                f"needs one: {remedy}, or use at most {size} device{'s'[: size != 1]}"
            )


def device_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of a Trainer that runs in all processes of the run, on the same devices.

    Args:
        cfg: Configuration of the run.
    """
    settings: dict[str, Any] = {"devices": _devices(cfg), "num_nodes": cfg.trainer.num_nodes}
    # Lightning would otherwise take a process by itself within a job of SLURM for one of several.
    environment = LaunchedEnvironment() if place().world_size > 1 else LightningEnvironment()
    return settings | {"plugins": [environment]}


def leave_signals_alone(trainer: Trainer) -> Trainer:
    """Keep a Trainer from handling signals itself, and return it.

    Lightning's handler of TERM starts a collective operation wherever the signal arrives. Another process may be in the
    middle of an optimizer step, and both would wait for each other forever. See :mod:`spo.signals`.

    Args:
        trainer: New Trainer.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer
