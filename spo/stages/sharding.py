"""Sharding of models while they are loaded."""

from __future__ import annotations

from functools import partial

from omegaconf import DictConfig
from torch.distributed.device_mesh import init_device_mesh

from spo.forward.sharding import shard
from spo.models.sharded_loading import Shard
from spo.processes import world_size
from spo.stages.devices import process_device
from spo.stages.from_config import build_sharding


def shard_while_loading(cfg: DictConfig) -> Shard | None:
    """Return the function that shards a model before its weights are read, ``None`` where each process has all of it.

    Args:
        cfg: Configuration of the run, resolved.
    """
    settings = build_sharding(cfg)
    if settings is None or world_size() == 1:
        return None
    mesh = init_device_mesh(process_device(cfg).type, (world_size(),), mesh_dim_names=("data_parallel",))
    return partial(shard, mesh=mesh, settings=settings)
