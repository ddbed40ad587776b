"""Sharding of a model over processes (FSDP2), and the contexts in which its weights are whole.

A forward pass gathers the weights of one block after the other, so all processes have to take part in it. Afterwards
the weights of the root, such as embeddings and head, stay whole until the backward pass. :func:`reshard` takes them
back where no backward pass follows, since loading, adapters and optimizers have to see shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

HALF_PRECISION = (torch.bfloat16, torch.float16)
MAX_SHARE_OF_FREE_MEMORY = 0.5
"""Largest share of the free memory that the whole weights may take while sampling; the rest is for keys and values."""

UnshardSampling = bool | Literal["auto"]


@dataclass(frozen=True)
class Sharding:
    """Settings of sharded models.

    Attributes:
        compute_dtype: Dtype in which forward and backward passes take place; ``None`` for that of the weights.
        unshard_sampling: Whether sampling gathers the whole policy once, instead of block by block for every token.
            ``"auto"`` gathers it where it fits into the memory of every device.
    """

    compute_dtype: torch.dtype | None = None
    unshard_sampling: UnshardSampling = "auto"


def shard(model: nn.Module, mesh: DeviceMesh, settings: Sharding) -> None:
    """Shard every block of a model by itself, and the rest together. A sharded model stays as it is.

    Gradients are added up over processes in float32 at least.

    Args:
        model: Model, whole.
        mesh: Processes to shard over.
        settings: Settings of sharded models.
    """
    if isinstance(model, FSDPModule):
        return
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    is_half = settings.compute_dtype in HALF_PRECISION or not dtypes.isdisjoint(HALF_PRECISION)
    policy = MixedPrecisionPolicy(settings.compute_dtype, torch.float32 if is_half else None)
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if hasattr(model, "peft_config"):  # It generates with the model below the adapter, which is not the root.
        register_fsdp_forward_method(model, "generate")
    vars(model)["sharding"] = settings


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists of modules. Lists below, such as experts, may not run everywhere."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which forward passes of a model take place."""
    settings: Sharding = vars(model).get("sharding", Sharding())
    return settings.compute_dtype or next(model.parameters()).dtype


def round_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a whole model compute what it would as a sharded one with this ``compute_dtype``: buffers stay as they are.

    Args:
        model: Model, whole.
        dtype: Dtype of forward passes.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def reshard(model: nn.Module) -> None:
    """Give up the whole weights that forward passes have left in a sharded model. Nothing happens to other models."""
    if isinstance(model, FSDPModule) and not is_gathered(model):
        for module in _sharded_modules(model):
            module.reshard()


def is_gathered(model: nn.Module) -> bool:
    """Return whether a sharded model is in the context of :func:`gathered` and has its weights whole."""
    return "is_gathered" in vars(model)


def needs_all_processes(model: nn.Module) -> bool:
    """Return whether each forward pass of a model needs all processes."""
    return isinstance(model, FSDPModule) and not is_gathered(model)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Make a context for sampling, in which a sharded model is whole if its settings say so and it fits.

    All processes enter and leave it together. Inside, each may run the model as often as it likes. Contexts of one
    model may be nested. Weights and gradients must not change inside.

    Args:
        model: Model, sharded or not.
    """
    if not needs_all_processes(model) or not _gathers(model):
        try:
            yield
        finally:
            reshard(model)
        return
    for module in _sharded_modules(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    vars(model)["is_gathered"] = True
    try:
        yield
    finally:
        del vars(model)["is_gathered"]
        for module in _sharded_modules(model):
            module.set_reshard_after_forward(module is not model, recurse=False)
        reshard(model)


def _gathers(model: nn.Module) -> bool:
    """Return whether sampling gathers the whole model, which all processes decide together."""
    settings: Sharding | None = vars(model).get("sharding")
    if settings is None or settings.unshard_sampling != "auto":
        return settings is not None and bool(settings.unshard_sampling)
    parameter = next(model.parameters())
    if parameter.device.type != "cuda":
        return True
    needed = sum(p.numel() * (settings.compute_dtype or p.dtype).itemsize for p in model.parameters())
    fits = torch.tensor(int(needed <= MAX_SHARE_OF_FREE_MEMORY * _free_bytes(parameter)), device=parameter.device)
    torch.distributed.all_reduce(fits, op=torch.distributed.ReduceOp.MIN)
    return bool(fits)


def _free_bytes(tensor: Tensor) -> int:
    """Return the free memory of a CUDA device, that which PyTorch holds without using it included."""
    device = tensor.device
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _sharded_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
