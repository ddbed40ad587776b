"""Settings of sharded models, and their sharding while they are loaded."""

from __future__ import annotations

from functools import partial

import torch
from hydra.utils import get_class
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig, OmegaConf
from torch.distributed.device_mesh import init_device_mesh

from spo.forward.sharding import Sharding, shard
from spo.models.sharded_loading import Shard
from spo.processes import world_size
from spo.stages.devices import process_device


def build_sharding(cfg: DictConfig) -> Sharding | None:
    """Return the settings of sharded models, ``None`` if the strategy does not shard them.

    Args:
        cfg: Configuration of the run, resolved.
    """
    target = OmegaConf.select(cfg, "strategy.plugin._target_") if OmegaConf.is_config(cfg.strategy.plugin) else None
    if target is None or not issubclass(get_class(target), ModelParallelStrategy):
        return None
    compute_dtype = torch.bfloat16 if cfg.trainer.precision == "bf16-mixed" else None
    return Sharding(compute_dtype, cfg.strategy.get("unshard_sampling", Sharding.unshard_sampling))


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
