"""Dataclasses whose tensors move to a device together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


def copy_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the host to ``device`` without blocking the host."""
    if device.type != "cuda":
        return tensor.to(device)
    # Only copies from pinned memory are asynchronous.
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Movable:
    """A dataclass whose tensors move to a device together, with those in nested ``Movable``, lists and mappings.

    Every other field stays on the host.
    """

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return a copy in which ``Tensor.to`` was applied to each tensor."""
        return self._map(lambda value: value.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """Return a copy in page-locked host memory. Data loaders call a method of this name."""
        return self._map(lambda value: value.pin_memory())

    def to_device_async(self, device: torch.device) -> Self:
        """Copy from the host to ``device`` without blocking the host."""

        def copied(value: Any) -> Any:
            return copy_async(value, device) if isinstance(value, Tensor) else value.to_device_async(device)

        return self._map(copied)

    def _map(self, change: Callable[[Any], Any]) -> Self:
        """Return a copy in which ``change`` was applied to each tensor and each ``Movable``."""

        def changed(value: Any) -> Any:
            if isinstance(value, (Tensor, Movable)):
                return change(value)
            if isinstance(value, dict):
                return {key: changed(item) for key, item in value.items()}
            return [changed(item) for item in value] if isinstance(value, list) else value

        return replace(self, **{f.name: changed(getattr(self, f.name)) for f in fields(self)})
