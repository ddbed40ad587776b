"""State of a sharded policy and its optimizer in a folder of ``torch.distributed.checkpoint``.

Each process writes its own shards, and any number of processes reads them. Tensors are streamed to and from the disk,
so that no process has more than its own shards in memory. What is not a tensor is in ``meta.pt``.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from spo.errors import UserError
from spo.forward.sharding import reshard

META = "meta.pt"
"""File of a folder that holds what is not a tensor of model or optimizer."""
WEIGHTS = "state_dict"
OPTIMIZERS = "optimizer_states"
"""Entries of a checkpoint, which has the state of each optimizer by the position or the name of its parameters."""


def reshard_parts(module: nn.Module) -> None:
    """Give up the whole weights of each sharded model that a module has."""
    for part in module.modules():
        reshard(part)


# --- optimizers ------------------------------------------------------------------------------------------------------


def named_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer with the names of parameters in place of their positions, without copies.

    Args:
        model: Model whose parameters the optimizer has.
        optimizer: Optimizer.
    """
    reshard_parts(model)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[parameter]: dict(entries) for parameter, entries in optimizer.state.items()}
    groups = [group | {"params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return {"state": state, "param_groups": groups}


def by_position(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of :func:`named_optimizer_state` as optimizers save it, by the positions of parameters."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    positions = {name: position for position, name in enumerate(names)}
    groups = [group | {"params": [positions[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {positions[name]: entries for name, entries in state["state"].items()}, "param_groups": groups}


# --- writing ---------------------------------------------------------------------------------------------------------


def write_state(checkpoint: dict[str, Any], folder: Path, *, is_first: bool) -> None:
    """Write a checkpoint into a folder. All processes call this.

    Args:
        checkpoint: Checkpoint whose weights are shards and whose optimizer states have names.
        folder: Empty folder, on a file system that all processes share.
        is_first: Whether this process writes what is not a tensor.

    Raises:
        OSError: A process cannot write its shards.
    """
    tensors: dict[str, Any] = {WEIGHTS: checkpoint[WEIGHTS]}
    others = []
    for position, state in enumerate(checkpoint[OPTIMIZERS]):
        tensors[f"{OPTIMIZERS}.{position}"] = _split(state["state"], is_tensor=True)
        others.append({"state": _split(state["state"], is_tensor=False), "param_groups": state["param_groups"]})
    _translated(lambda: dcp.save(tensors, checkpoint_id=folder))
    if is_first:
        rest = {key: value for key, value in checkpoint.items() if key != WEIGHTS}
        torch.save(rest | {OPTIMIZERS: others}, folder / META)


def _split(state: Mapping[str, Mapping[str, Any]], *, is_tensor: bool) -> dict[str, dict[str, Any]]:
    return {
        name: {key: value for key, value in entries.items() if isinstance(value, Tensor) == is_tensor}
        for name, entries in state.items()
    }


def _translated(act: Callable[[], None]) -> None:
    """Turn the error of the library, which is not an ``Exception``, into that of the process that failed."""
    try:
        act()
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror or str(cause), cause.filename) from error
        raise RuntimeError(f"the checkpoint failed on rank {rank}: {cause}") from error


# --- reading ---------------------------------------------------------------------------------------------------------


def read_meta(folder: Path) -> dict[str, Any]:
    """Return what is not a tensor of model or optimizer."""
    return torch.load(folder / META, map_location="cpu", weights_only=True)


def read_whole(folder: Path) -> dict[str, Any]:
    """Return the checkpoint in a folder as a single file would hold it, whole, in the memory of this process."""
    meta = read_meta(folder)
    tensors = _empty(_metadata(folder), lambda path, found: torch.empty(found.size, dtype=found.properties.dtype))
    _load(tensors, folder, no_dist=True)
    optimizers = [by_position(_merged(tensors, position, state)) for position, state in enumerate(meta[OPTIMIZERS])]
    return meta | {WEIGHTS: tensors.get(WEIGHTS, {}), OPTIMIZERS: optimizers}


def load_shards(model: nn.Module, optimizers: Sequence[Optimizer], path: Path, *, strict: bool) -> dict[str, Any]:
    """Load a checkpoint into a sharded model and its optimizers. All processes call this.

    Args:
        model: Sharded model, on any number of processes.
        optimizers: Optimizers of the model; empty to load the weights alone.
        path: Folder, or the single file of a run on one device or under DDP.
        strict: Whether the checkpoint must have every weight.

    Returns:
        The checkpoint without weights and optimizer states.

    Raises:
        UserError: The checkpoint does not fit the model.
    """
    reshard_parts(model)
    checkpoint = _from_folder(model, optimizers, path) if path.is_dir() else _from_file(model, optimizers, path)
    weights = checkpoint.pop(WEIGHTS)
    own = model.state_dict()
    unfit = [name for name, tensor in weights.items() if name not in own or own[name].shape != tensor.shape]
    if unfit := sorted(unfit) + (sorted(own.keys() - weights.keys()) if strict else []):
        raise UserError(
            f"{path} does not fit the model: {unfit[0]} is missing in one of them, or has another shape; restore the "
            "configuration and the code of the run, or run again with rerun=true"
        )
    # The optimizers come first: the weights are exact then, whatever an optimizer does when it is loaded.
    for optimizer, state in zip(optimizers, checkpoint.pop(OPTIMIZERS), strict=False):
        optimizer.load_state_dict(state)
    model.load_state_dict(weights, strict=False)
    return checkpoint


def _from_folder(model: nn.Module, optimizers: Sequence[Optimizer], folder: Path) -> dict[str, Any]:
    """Read the shards of this process from a folder."""
    own, parameters = model.state_dict(), dict(model.named_parameters())

    def empty(path: tuple[str, ...], found: TensorStorageMetadata) -> Tensor:
        like = own.get(path[1]) if path[0] == WEIGHTS else parameters.get(path[1])
        if isinstance(like, DTensor) and like.shape == found.size:
            return torch.empty_like(like, dtype=found.properties.dtype)
        return torch.empty(found.size, dtype=found.properties.dtype)

    meta = read_meta(folder)
    tensors = _empty(_metadata(folder), empty, weights_only=not optimizers)
    _load(tensors, folder)
    states = [by_position(_merged(tensors, position, state)) for position, state in enumerate(meta[OPTIMIZERS])]
    return meta | {WEIGHTS: tensors.get(WEIGHTS, {}), OPTIMIZERS: states if optimizers else []}


def _from_file(model: nn.Module, optimizers: Sequence[Optimizer], file: Path) -> dict[str, Any]:
    """Read the shards of this process from a single file, of which only these come into memory."""
    checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    own = model.state_dict()
    weights = {name: _own_shard(tensor, own.get(name)) for name, tensor in checkpoint[WEIGHTS].items()}
    states = []
    for optimizer, saved in zip(optimizers, checkpoint[OPTIMIZERS], strict=False):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        shards = {
            position: {key: _own_shard(value, parameters[position]) for key, value in entries.items()}
            for position, entries in saved["state"].items()
        }
        states.append(saved | {"state": shards})
    return checkpoint | {WEIGHTS: weights, OPTIMIZERS: states}


def _own_shard(value: Any, like: Tensor | None) -> Any:
    """Return the shard of a whole tensor that lies where that of another tensor does; other values as they are."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    own = value[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    own = own.clone(memory_format=torch.contiguous_format).to(like.device)
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _merged(tensors: Mapping[str, Any], position: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer, of which tensors and other values were apart."""
    found = tensors.get(f"{OPTIMIZERS}.{position}", {})
    return {**state, "state": {name: {**entries, **found.get(name, {})} for name, entries in state["state"].items()}}


def _empty(
    metadata: Metadata,
    empty: Callable[[tuple[str, ...], TensorStorageMetadata], Tensor],
    *,
    weights_only: bool = False,
) -> dict[str, Any]:
    """Return tensors to load into, nested as they were saved."""
    tensors: dict[str, Any] = {}
    for key, found in metadata.state_dict_metadata.items():
        path = tuple(map(str, metadata.planner_data[key]))
        if isinstance(found, TensorStorageMetadata) and (path[0] == WEIGHTS or not weights_only):
            place = tensors
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = empty(path, found)
    return tensors


def _load(tensors: dict[str, Any], folder: Path, *, no_dist: bool = False) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
        _translated(lambda: dcp.load(tensors, storage_reader=_Reader(folder), no_dist=no_dist))


def _metadata(folder: Path) -> Metadata:
    return _Reader(folder).read_metadata()


class _Reader(dcp.FileSystemReader):
    """Reader that makes nothing but the classes of a checkpoint from ``.metadata``, which is a pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _Unpickler(stream).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype) or (module, name) in _CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")


_CLASSES = {
    *((dcp.metadata.__name__, name) for name in (*dcp.metadata.__all__, "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
