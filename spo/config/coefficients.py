"""The coefficients, alpha and beta, that a configuration reads; an unused one is not part of a run's identity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

COEFFICIENTS = ("alpha", "beta")


def unused_coefficients(cfg: DictConfig) -> list[str]:
    """Return the coefficients that neither the loss nor the regularizer reads.

    Parts that cannot be made count as reading everything; the checks report what is wrong with them.
    """
    try:
        nodes = {
            "loss": OmegaConf.to_container(cfg.method.loss, resolve=True),
            "regularizer": OmegaConf.to_container(cfg.regularizer, resolve=True),
        }
        return list(_unused(json.dumps(nodes, sort_keys=True)))
    except Exception:
        return []


# Many places ask, for the same few configurations; a loss may be slow to make.
@cache
def _unused(nodes: str) -> tuple[str, ...]:
    from hydra.utils import instantiate

    parts: Mapping[str, Any] = json.loads(nodes)
    loss = instantiate(parts["loss"], _convert_="all")
    regularizer = instantiate(parts["regularizer"], _convert_="all")
    reads = (loss.uses_alpha, loss.uses_beta or regularizer.follows_beta)
    return tuple(name for name, is_read in zip(COEFFICIENTS, reads, strict=True) if not is_read)
