"""Which of alpha and beta a composition does not read: they are no part of what it is."""

from __future__ import annotations

from hydra.utils import instantiate
from omegaconf import DictConfig

COEFFICIENTS = ("alpha", "beta")


def unused_coefficients(cfg: DictConfig) -> list[str]:
    """The coefficients that neither the loss nor the regularizer reads.

    Parts that cannot be made count as reading everything: what is wrong with them is for the checks to say.
    """
    from spo.losses import as_loss

    try:
        loss = as_loss(instantiate(cfg.method.loss, _convert_="all"))
        regularizer = instantiate(cfg.regularizer, _convert_="all")
    except Exception:
        return []
    reads = (loss.uses_alpha, loss.uses_beta or regularizer.follows_beta)
    return [name for name, is_read in zip(COEFFICIENTS, reads, strict=True) if not is_read]
