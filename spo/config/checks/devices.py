"""Checks of the devices of a run and of the strategy that uses them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from omegaconf import DictConfig

from spo.config.checks.targets import CheckedParts
from spo.config.compose import tasks_per_node
from spo.config.nodes import select
from spo.processes import place

MAX_ZERO_STAGE = 2
"""Largest stage of ZeRO that is supported. Stage 3 shards the weights, and no test on GPUs has passed with it."""


def batch_problems(cfg: DictConfig) -> Iterator[str]:
    """Yield a batch that has fewer pairs than the run has devices, as far as their number is known.

    Args:
        cfg: Composed configuration.
    """
    size, nodes, devices = (select(cfg, key) for key in ("data.batch_size", "trainer.num_nodes", "trainer.devices"))
    if not isinstance(size, int) or not isinstance(nodes, int) or size < 1:
        return
    started = place().world_size
    count = started if started > 1 else nodes * tasks_per_node(devices)
    if size < count:
        yield (
            f"data.batch_size={size}: a batch has fewer pairs than the run has devices ({count}): set it to {count} "
            "or more, or set a smaller trainer.devices"
        )


def strategy_problems(cfg: DictConfig, parts: CheckedParts) -> Iterator[str]:
    """Yield why the strategy cannot run.

    Args:
        cfg: Composed configuration.
        parts: Parts of the run that ``cfg`` describes.
    """
    if getattr(parts.target("strategy.plugin"), "__name__", None) != "DeepSpeedStrategy":
        return
    if select(cfg, "trainer.accelerator") == "cpu":
        yield "strategy=deepspeed runs on GPUs alone, and trainer.accelerator=cpu: choose strategy=ddp or strategy=fsdp"
    elif find_spec("deepspeed") is None:
        yield "strategy=deepspeed needs a package that is not installed: pip install 'spo[deepspeed]'"
    stage = select(cfg, "strategy.plugin.stage")
    if isinstance(stage, int) and stage > MAX_ZERO_STAGE:
        yield (
            f"strategy.plugin.stage={stage}: ZeRO-{stage} is not supported: set it to {MAX_ZERO_STAGE}, or choose "
            "strategy=fsdp, which shards the weights"
        )
