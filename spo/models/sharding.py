"""Sharding of a policy over processes (FSDP2)."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(policy: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every block of a policy by itself, and the rest together. A sharded policy stays as it is.

    Args:
        policy: Policy, whole.
        mesh: Processes to shard over.
    """
    if isinstance(policy, FSDPModule):
        return
    for blocks in [module for module in policy.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
