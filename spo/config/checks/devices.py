"""Checks of the devices of a run and of the strategy that uses them."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from spo.config.compose import tasks_per_node
from spo.config.nodes import select
from spo.processes import place

MAX_ZERO_STAGE = 2
"""Largest stage of ZeRO that is supported. Stage 3 shards the weights, and no test on GPUs has passed with it."""


def device_problems(cfg: DictConfig) -> Iterator[str]:
    """Yield a batch that the devices cannot share, and a strategy that cannot run on them.

    Args:
        cfg: Composed configuration.
    """
    nodes, started = select(cfg, "trainer.num_nodes"), place().world_size
    if isinstance(nodes, int):
        count = started if started > 1 else nodes * tasks_per_node(select(cfg, "trainer.devices"))
        for key in ("data.batch_size", "data.num_pairs"):
            size = select(cfg, key)
            if isinstance(size, int) and 0 < size < count:
                yield (
                    f"{key}={size}: these pairs are fewer than the devices of the run ({count}): set {count} or more, "
                    "or fewer trainer.devices"
                )
    if not str(select(cfg, "strategy.plugin._target_")).endswith(".DeepSpeedStrategy"):
        return
    if select(cfg, "trainer.accelerator") == "cpu":
        yield "strategy=deepspeed runs on GPUs alone, and trainer.accelerator=cpu: choose strategy=ddp or strategy=fsdp"
    stage = select(cfg, "strategy.plugin.stage")
    if isinstance(stage, int) and stage > MAX_ZERO_STAGE:
        yield (
            f"strategy.plugin.stage={stage}: ZeRO-{stage} is not supported: set it to {MAX_ZERO_STAGE}, or choose "
            "strategy=fsdp, which shards the weights"
        )
