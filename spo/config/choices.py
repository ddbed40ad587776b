"""The record of the groups' members that a configuration was composed of."""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from spo.records.operational_keys import CHOICES


def pin_choices(cfg: DictConfig) -> None:
    """Write the chosen member of each group into the configuration, in place, unless it holds them already.

    Hydra knows the members only while it composes or runs a job, and a resumed run does without Hydra.

    Args:
        cfg: Composed configuration, with or without Hydra's own node. A run of version 0.1 does not have the key.
    """
    if CHOICES not in cfg or cfg[CHOICES] is not None:
        return
    hydra: Any = cfg.get("hydra") or (HydraConfig.get() if HydraConfig.initialized() else None)
    chosen = {} if hydra is None else hydra.runtime.choices
    # Groups in a package of their own (``logger@logger.more``) and those of Hydra are not part of the setting.
    cfg[CHOICES] = {
        str(group): str(member) for group, member in chosen.items() if member is not None and str(group).isidentifier()
    }
